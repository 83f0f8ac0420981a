"""The Serve replica of the global scheduler."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from cluster.autoscaling.signals import FleetSignals, PoolTarget
from cluster.decision_record import DecisionRecorder
from cluster.replica import prepare_replica
from cluster.scheduler.admission import Admission
from cluster.scheduler_service import SchedulerService
from core.config import BatonConfig
from core.messages.fleet import Role


class GlobalScheduler:
    """Serve's replica around SchedulerService; others ask for its RPC address."""

    async def __init__(self, config: BatonConfig) -> None:  # type: ignore[misc]
        host = prepare_replica(config, "scheduler")
        scheduler_id = f"scheduler-{secrets.token_hex(4)}"
        admission = Admission(config.scheduler, config.autoscaling.rate_window_s, config.generation)
        settings, security = config.scheduler, config.cluster.security
        recorder = None
        if settings.record_dir:
            path = Path(settings.record_dir) / f"{scheduler_id}.decisions"
            recorder = DecisionRecorder(path, settings, int(settings.record_mib * 2**20))
        self._service = SchedulerService(admission, scheduler_id, host, security, recorder)
        self._address = await self._service.start()

    async def address(self) -> str:
        """host:port of the RPC server."""
        return self._address

    async def signals(self, generation: str, asked: Mapping[Role, PoolTarget], interval_s: float) -> FleetSignals:
        """See SchedulerService.signals."""
        return self._service.signals(generation, asked, interval_s)

    async def __del__(self) -> None:
        """Ends watches and server."""
        await self._service.close()

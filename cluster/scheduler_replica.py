"""The Serve replica of the global scheduler."""

import secrets
from functools import partial

from cluster.autoscaler import Autoscaler, Decision
from cluster.autoscaling.autoscaling import Autoscaling
from cluster.replica import prepare_replica
from cluster.scaling import PoolScaler
from cluster.scheduler.admission import Admission
from cluster.scheduler_service import SchedulerService
from core.config import BatonConfig


class GlobalScheduler:
    """Serve's replica around SchedulerService; others ask for its RPC address.

    When configured, its Autoscaler moves the pools of the generation that the front was deployed with; those of other
    generations stay at their `min_replicas`.
    """

    async def __init__(self, config: BatonConfig) -> None:  # type: ignore[misc]
        host = prepare_replica(config, "scheduler")
        scheduler_id = f"scheduler-{secrets.token_hex(4)}"
        admission = Admission(config.scheduler, config.autoscaling.rate_window_s, config.generation)
        self._service = SchedulerService(admission, scheduler_id, host, config.cluster.secret)
        self._autoscaler: Autoscaler | None = None
        if config.autoscaling.is_active:
            scaler = PoolScaler(config.generation)
            signals = partial(self._service.signals, config.generation)
            self._autoscaler = Autoscaler(
                config.autoscaling, Autoscaling.of(config), signals, scaler.resize, scaler.targets
            )
            self._autoscaler.start()
        self._address = await self._service.start()

    async def address(self) -> str:
        """host:port of the RPC server."""
        return self._address

    async def autoscaling_history(self) -> tuple[Decision, ...]:
        """The last decisions, oldest first; none where nothing scales."""
        return self._autoscaler.history if self._autoscaler else ()

    async def __del__(self) -> None:
        """Ends autoscaler, watches and server."""
        if self._autoscaler is not None:
            await self._autoscaler.close()
        await self._service.close()

"""The Serve replica of the global scheduler."""

import secrets

from cluster.replica import prepare_replica
from cluster.scheduler_service import SchedulerService
from core.config import BatonConfig


class GlobalScheduler:
    """Serve's replica around SchedulerService; others ask it for its RPC address."""

    async def __init__(self, config: BatonConfig) -> None:  # type: ignore[misc]
        host = prepare_replica(config, "scheduler")
        scheduler_id = f"scheduler-{secrets.token_hex(4)}"
        self._service = SchedulerService(config.scheduler, scheduler_id, host, config.cluster.secret)
        self._address = await self._service.start()

    async def address(self) -> str:
        """host:port of the RPC server."""
        return self._address

    async def __del__(self) -> None:
        """Ends watches and server."""
        await self._service.close()

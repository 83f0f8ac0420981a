"""A rank as a Ray actor: the same Rank that runs as a plain process, in the actor's event loop."""

import logging
import os
import socket

import ray

from core.messages.fleet import RankHealth, ReplicaInfo, Role
from core.telemetry import configure_logging
from worker.spec import RankSpec

logger = logging.getLogger(__name__)


@ray.remote
class RankActor:
    """Its death is the rank's death; the supervisor watches `run`."""

    def __init__(self, log_path: str) -> None:
        configure_logging(log_path or None)
        logger.info("process %d starts", os.getpid())

    async def free_address(self, host: str) -> str:
        """host:port where this node has nothing listening now."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    async def pid(self) -> int:
        """The actor's process, which is the rank's."""
        return os.getpid()

    async def start(self, spec: RankSpec) -> ReplicaInfo:
        """Loads and begins to serve."""
        # torch stays out of the module that every Ray process imports
        from decode_worker.service import DecodeService
        from prefill_worker.service import PrefillService
        from worker.rank import Rank

        self._rank = Rank(spec, PrefillService if spec.role is Role.PREFILL else DecodeService)
        return await self._rank.start()

    async def run(self) -> None:
        """Pending while the rank works; raises what ended it."""
        await self._rank.run()

    async def health(self) -> RankHealth:
        """Counters; answered during long steps too."""
        return await self._rank.health()

    async def drain(self, timeout_s: float) -> None:
        """Finishes or hands over; for the first rank."""
        await self._rank.drain(timeout_s)

    async def close(self) -> None:
        """Ends the rank, not the actor."""
        await self._rank.close()

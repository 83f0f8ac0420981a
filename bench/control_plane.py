"""The global scheduler and an ingress's orchestrator in this event loop, without Ray and HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from bench.rank_processes import LOOPBACK
from cluster.decision_record import DecisionRecorder
from cluster.ingress.orchestrator import Fleet, Orchestrator
from cluster.ingress.scheduler_client import SchedulerClient
from cluster.ingress.token_streams import TokenStreams
from cluster.scheduler.admission import Admission
from cluster.scheduler_service import SchedulerService
from core.config import SchedulerConfig, TransferConfig
from core.errors import BatonError
from core.messages.fleet import Empty, ReplicaInfo
from core.messages.to_scheduler import Register
from core.security import UNGUARDED, Security
from rpc.client import RpcClient
from rpc.methods import REGISTER

REGISTER_INTERVAL_S = 0.2
MAX_ATTEMPTS = 5
MAX_BUFFERED_TOKENS = 4096


@dataclass
class ControlPlane:
    """Everything of a fleet but its replicas; those that are registered get requests."""

    orchestrator: Orchestrator
    scheduler: SchedulerService
    scheduler_client: SchedulerClient
    client: RpcClient
    scheduler_address: str
    registering: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def register(self, info: ReplicaInfo) -> None:
        """What a supervisor does: tells the scheduler, again and again."""
        self.registering[info.replica_id] = asyncio.create_task(self._register(info))

    def forget(self, replica_id: str) -> None:
        """Tells the scheduler no longer."""
        self.registering.pop(replica_id).cancel()

    async def until_ready(self, num_replicas: int, timeout_s: float = 30.0) -> None:
        """Waits until that many replicas take work. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while len((await self.scheduler.book(Empty())).replicas) < num_replicas:
                await asyncio.sleep(0.02)

    async def _register(self, info: ReplicaInfo) -> None:
        while True:
            with suppress(BatonError):
                await self.client.call(self.scheduler_address, REGISTER, Register(info), 2)
            await asyncio.sleep(REGISTER_INTERVAL_S)


@asynccontextmanager
async def control_plane(
    scheduler: SchedulerConfig,
    transfer: TransferConfig,
    block_size: int,
    security: Security = UNGUARDED,
    recorder: DecisionRecorder | None = None,
) -> AsyncIterator[ControlPlane]:
    """Starts all parts, and ends all of them, failure or not. `recorder` hears what the scheduler hears."""
    async with AsyncExitStack() as stack:
        client = RpcClient(security)
        stack.push_async_callback(client.close)
        service = SchedulerService(Admission(scheduler), "s", LOOPBACK, security, recorder)
        address = await service.start()
        stack.push_async_callback(service.close)

        async def resolve() -> str:
            return address

        scheduler_client = SchedulerClient(client, resolve)
        scheduler_client.start()
        stack.push_async_callback(scheduler_client.close)
        streams = TokenStreams("ingress", client, transfer, MAX_BUFFERED_TOKENS)
        stack.push_async_callback(streams.close)
        fleet = Fleet("ingress", block_size, "", MAX_ATTEMPTS)
        orchestrator = Orchestrator(fleet, transfer, client, scheduler_client, streams)
        plane = ControlPlane(orchestrator, service, scheduler_client, client, address)
        try:
            yield plane
        finally:
            for task in plane.registering.values():
                task.cancel()

"""A fleet without Ray in one event loop: real ranks, real RPC, real transfers, the real scheduler and orchestrator."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.control_plane import ControlPlane, control_plane
from bench.rank_processes import free_address
from cluster.decision_record import DecisionRecorder
from cluster.ingress.generation import Generation
from cluster.ingress.orchestrator import Orchestrator
from cluster.ingress.scheduler_client import SchedulerClient
from cluster.scheduler_service import SchedulerService
from core.config import ModelConfig, PoolConfig, SchedulerConfig, TransferConfig
from core.messages.fleet import ReplicaInfo, Role
from core.sampling import SamplingParams
from core.security import UNGUARDED, Security
from decode_worker.service import DecodeService
from kv_transfer.channels.select import Connect, make_connectors
from prefill_worker.service import PrefillService
from worker.rank import Rank
from worker.spec import RankSpec, new_incarnation

HOST = "127.0.0.1"
BLOCK_SIZE = 16


@dataclass
class Replica:
    """A running replica: its first rank, the others, and a task for each."""

    rank: Rank
    info: ReplicaInfo
    tasks: list[asyncio.Task]
    others: list[Rank]

    @property
    def service(self):
        return self.rank._serving.role

    @property
    def pool(self):
        return self.service._context.block_pool


class FleetHandle:
    """What a test needs of the fleet."""

    def __init__(self, plane: ControlPlane, spec_for, connect: Connect) -> None:
        self.replicas: dict[str, Replica] = {}
        self.register = plane.register
        self.until_ready = plane.until_ready
        self.orchestrator: Orchestrator = plane.orchestrator
        self.scheduler: SchedulerService = plane.scheduler
        self.scheduler_address = plane.scheduler_address
        self.scheduler_client: SchedulerClient = plane.scheduler_client
        self._plane = plane
        self._spec_for = spec_for
        self._connect = connect

    async def add(self, name: str, role: Role, weight_lenders: tuple[str, ...] = (), **of_pool: object) -> Replica:
        """`weight_lenders`: one for each rank, or none; `of_pool`: what of its pool differs from the fleet's."""
        make = PrefillService if role is Role.PREFILL else DecodeService
        spec = self._spec_for(name, role)
        spec = replace(spec, pool=spec.pool.model_copy(update=of_pool))
        if spec.pool.num_ranks > 1:
            addresses = tuple(free_address() for _ in range(spec.pool.num_ranks))
            spec = replace(spec, rank_addresses=addresses, store_address=free_address())
        lenders = [(lender,) for lender in weight_lenders] or [()] * spec.pool.num_ranks
        ranks = [
            Rank(replace(spec, rank=number, weight_lenders=lenders[number]), make, self._connect)
            for number in range(spec.pool.num_ranks)
        ]
        info, *_ = await asyncio.gather(*(rank.start() for rank in ranks))
        tasks = [asyncio.create_task(rank.run()) for rank in ranks]
        replica = self.replicas[name] = Replica(ranks[0], info, tasks, ranks[1:])
        self.register(info)
        return replica

    async def stop(self, name: str) -> None:
        """Abruptly: no drain."""
        replica = self.replicas.pop(name)
        self._plane.forget(name)
        for task in replica.tasks:
            task.cancel()
        await asyncio.gather(*replica.tasks, return_exceptions=True)
        await asyncio.gather(*(rank.close() for rank in (replica.rank, *replica.others)))

    async def until_quiet(self) -> None:
        """Waits until nothing is held anywhere; fails naming what is left."""
        try:
            async with asyncio.timeout(15):
                while self.held():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"still held: {self.held()}") from None

    def held(self) -> dict[str, int]:
        held = {}
        for name, replica in self.replicas.items():
            service, pool = replica.service, replica.pool
            held[f"{name} blocks"] = pool.num_held
            held[f"{name} promised"] = pool.num_promised
            held[f"{name} tasks"] = len(service._tasks)
            books = service._handoffs if replica.info.role is Role.DECODE else service._deliveries
            held[f"{name} books"] = len(books)
            pool.validate()
        held["reserved"] = len(self.scheduler._admission.reservations)
        held["waiting"] = self.scheduler._admission.num_waiting
        return {name: count for name, count in held.items() if count}


@asynccontextmanager
async def running_fleet(
    checkpoint: Path,
    num_prefill: int = 1,
    num_decode: int = 1,
    pool: PoolConfig | None = None,
    transfer: TransferConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    connect: Connect = make_connectors,
    security: Security = UNGUARDED,
    recorder: DecisionRecorder | None = None,
):
    """Starts everything, and ends everything, failure or not."""
    pool = pool or PoolConfig(num_blocks=128, max_num_seqs=8, max_num_batched_tokens=64)
    transfer = transfer or TransferConfig(layers_per_group=1, slab_mib=0.01)
    scheduler = scheduler or SchedulerConfig(local_prefill_max_tokens=0)

    def spec_for(name: str, role: Role) -> RankSpec:
        model = ModelConfig(path=str(checkpoint), name="m", dtype="float32")
        addresses, incarnation = (f"{HOST}:0",), new_incarnation()
        return RankSpec(role, name, incarnation, 0, addresses, "", model, pool, transfer, BLOCK_SIZE, security)

    async with control_plane(scheduler, transfer, BLOCK_SIZE, security, recorder) as plane:
        fleet = FleetHandle(plane, spec_for, connect)
        try:
            for i in range(num_prefill):
                await fleet.add(f"p{i}", Role.PREFILL)
            for i in range(num_decode):
                await fleet.add(f"d{i}", Role.DECODE)
            await fleet.until_ready(num_prefill + num_decode)
            yield fleet
        finally:
            for name in list(fleet.replicas):
                await fleet.stop(name)


async def generate(fleet: FleetHandle, name: str, prompt, max_tokens: int, **sampling) -> list[int]:
    """All output tokens of one request, greedy unless told otherwise."""
    return await run(fleet, name, prompt, SamplingParams(max_tokens, **({"temperature": 0.0} | sampling)))


async def run(fleet: FleetHandle, name: str, prompt, params: SamplingParams, placement: str = "auto") -> list[int]:
    """All output tokens of one request."""
    tokens: list[int] = []
    async for event in fleet.orchestrator.generate(Generation(name, tuple(prompt), params, 60.0, placement)):
        tokens += event.token_ids
    return tokens

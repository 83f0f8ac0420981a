"""A real fleet that bench.reality plays loads on: rank processes, scheduler and orchestrator, without Ray and HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.control_plane import ControlPlane, control_plane
from bench.foreign_load import ForeignLoad
from bench.rank_processes import RankProcess, rank_processes, replica_ranks
from bench.reality_load import spell
from cluster.decision_record import DecisionRecorder, Event, read_events
from cluster.ingress.generation import Generation
from core.config import ModelConfig, PoolConfig, SchedulerConfig, TransferConfig
from core.errors import BatonError
from core.messages.fleet import Empty, ReplicaInfo, Role
from core.sampling import SamplingParams
from rpc.methods import HEALTH
from simulator.traces.trace import TracedRequest

REQUEST_TIMEOUT_S = 120.0
ECHO_INTERVAL_S = 0.1
RECORD_BYTES = 2**28


@dataclass
class Seen:
    """What became of a request. Seconds since the load began; `times` of each token, as the client got it."""

    traced: TracedRequest
    times: list[float] = field(default_factory=list)
    num_cached: int = 0
    reason: str = ""
    is_pair: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """From when the load says that it came."""
        return self.times[0] - self.traced.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        """Between its tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@dataclass
class Played:
    """A load on the real fleet."""

    seen: list[Seen]
    events: list[tuple[float, Event]]  # all that its scheduler heard and decided
    round_trips_s: list[float]  # of calls that ask for nothing, meanwhile
    foreign_cores: float


class RealFleet:
    """Replicas that live on; scheduler and orchestrator are new for each load."""

    def __init__(
        self, infos: Sequence[ReplicaInfo], scheduler: SchedulerConfig, transfer: TransferConfig, vocab: int, dir_: Path
    ) -> None:
        self.infos = infos
        self._scheduler = scheduler
        self._transfer = transfer
        self._vocab_size = vocab
        self._record = dir_ / "decisions"
        self._num_plays = 0

    async def play(self, load: Sequence[TracedRequest], placements: Sequence[str] = ("auto",)) -> Played:
        """In real time, whoever is late or not; placements in turns."""
        self._num_plays += 1
        recorder = DecisionRecorder(self._record, self._scheduler, RECORD_BYTES)
        block_size = self.infos[0].compatibility.block_size
        async with control_plane(self._scheduler, self._transfer, block_size, recorder=recorder) as plane:
            for info in self.infos:
                plane.register(info)
            await plane.until_ready(len(self.infos))
            prompts = [spell(one.prompt, self._vocab_size, self._num_plays) for one in load]
            foreign, round_trips_s = ForeignLoad(), list[float]()
            echo = asyncio.create_task(self._echo(plane, round_trips_s))
            began = time.perf_counter()
            requests = [
                self._request(plane, Seen(one), prompt, placements[number % len(placements)], began)
                for number, (one, prompt) in enumerate(zip(load, prompts, strict=True))
            ]
            seen = await asyncio.gather(*requests)
            cores = foreign.cores()
            echo.cancel()
            await asyncio.gather(echo, return_exceptions=True)
        return Played(seen, list(read_events(self._record)), round_trips_s, cores)

    async def _request(
        self, plane: ControlPlane, seen: Seen, prompt: Sequence[int], placement: str, began: float
    ) -> Seen:
        traced = seen.traced
        await asyncio.sleep(began + traced.arrival_s - time.perf_counter())
        sampling = SamplingParams(traced.num_output_tokens, temperature=0.0)
        generation = Generation(
            f"{self._num_plays}.{traced.request_id}", tuple(prompt), sampling, REQUEST_TIMEOUT_S, placement
        )
        try:
            async with aclosing(plane.orchestrator.generate(generation)) as events:
                async for event in events:
                    seen.times += [time.perf_counter() - began] * len(event.token_ids)
                    seen.num_cached += event.num_cached_tokens or 0
                    if event.report is not None:
                        seen.reason, seen.is_pair = event.report.placement, event.report.prefill is not None
        except BatonError as error:
            seen.error = type(error).__name__
        return seen

    async def _echo(self, plane: ControlPlane, round_trips_s: list[float]) -> None:
        while True:
            for info in self.infos:
                asked = time.perf_counter()
                with suppress(BatonError):
                    await plane.client.call(info.address, HEALTH, Empty(), 2.0)
                    round_trips_s.append(time.perf_counter() - asked)
                await asyncio.sleep(ECHO_INTERVAL_S / len(self.infos))


@asynccontextmanager
async def real_fleet(
    numbers: dict[Role, int],
    pool: PoolConfig,
    model: ModelConfig,
    scheduler: SchedulerConfig,
    transfer: TransferConfig,
    block_size: int,
    vocab_size: int,
    folder: Path,
    pace: float | None = None,
) -> AsyncIterator[RealFleet]:
    """Replicas of one rank, from ready to gone; with `pace` of bench.paced_rank."""
    specs = [
        spec
        for role, number in numbers.items()
        for index in range(number)
        for spec in replica_ranks(f"{role.value}-{index}", role, model, pool, transfer, block_size)
    ]
    ranks = [RankProcess(spec, folder, pace=pace) for spec in specs]
    async with rank_processes(ranks) as infos:
        yield RealFleet(list(infos.values()), scheduler, transfer, vocab_size, folder)

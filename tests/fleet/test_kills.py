"""Rank processes that die (SIGKILL) or fall silent (SIGSTOP) during handoffs, at any moment.

Clients get the right tokens, the survivors hold nothing soon after, and nothing piles up round after round.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bench.rank_processes import RankProcess, rank_processes
from cluster.ingress.generation import Generation
from core.config import TransferConfig
from core.errors import BatonError
from core.messages.fleet import ReplicaInfo, Role
from core.sampling import SamplingParams
from tests.fleet.in_process_fleet import FleetHandle, running_fleet
from tests.fleet.oracle import are_greedy
from tests.fleet.test_processes import specs_of
from worker.spec import new_incarnation

TRANSFER = TransferConfig(
    channel="tcp",
    layers_per_group=1,
    slab_mib=0.002,
    digest_share=1.0,
    pair_idle_timeout_s=1.0,
    control_timeout_s=1.0,
    data_timeout_s=2.0,
    lease_ttl_s=4.0,
)
QUIET_WITHIN_S = TRANSFER.rest_timeout_s + TRANSFER.lease_ttl_s  # beside what reports and a busy machine take
SLACK_S = 10.0
NUM_REQUESTS = 6
IDLE_WORKERS = 6  # of asyncio's and gRPC's pools, which start when first needed
NUM_TOKENS = 40
MOMENTS = ("opening", "prefilling", "transferring", "decoding")


@dataclass
class Usage:
    """What the kernel keeps for a process."""

    num_threads: int
    num_fds: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        proc = Path(f"/proc/{pid}")
        return cls(len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir())))


@dataclass
class Processes:
    """Two prefill and two decode replicas as processes, with the control plane here."""

    fleet: FleetHandle
    folder: Path
    ranks: dict[str, RankProcess]
    infos: dict[str, ReplicaInfo]
    random: random.Random
    model: object
    outcomes: Counter[str] = field(default_factory=Counter)
    pairs: set[tuple[str | None, str]] = field(default_factory=set)  # that carried a request to its end
    num_requests: int = 0
    longest_quiet_s: float = 0.0

    def pid(self, name: str) -> int:
        return self.ranks[name].process.pid

    def usage(self) -> dict[str, Usage]:
        return {name: Usage.of(self.pid(name)) for name in self.ranks}

    async def round(self, victim: str, number: int, moment: str) -> None:
        """Requests, a signal to one replica in their midst, and rest."""
        outputs: list[list[int]] = [[] for _ in range(NUM_REQUESTS)]
        clients = [asyncio.create_task(self._client(output)) for output in outputs]
        await self._until(moment, outputs)
        phases = {("prefill", "transfer", "decode")[min(len(output), 2)] for output in outputs}
        self.outcomes.update(f"{signal.Signals(number).name} of {victim[0]} during {phase}" for phase in phases)
        self.ranks[victim].process.send_signal(number)
        restarted = asyncio.create_task(self._restart(victim)) if number == signal.SIGKILL else None
        await asyncio.gather(*clients)
        if restarted is not None:
            await restarted
        else:
            self.ranks[victim].process.send_signal(signal.SIGCONT)
        await self._until_quiet()

    async def serve(self, num_requests: int) -> None:
        """Some more requests, to everyone."""
        await asyncio.gather(*(self._client([]) for _ in range(num_requests)))
        await self._until_quiet()

    async def connect_all(self) -> None:
        """Serves until every prefill replica has had to do with every decode replica, which costs both descriptors."""
        pairs = {(prefill, decode) for prefill in ("p0", "p1") for decode in ("d0", "d1")}
        for _ in range(20):
            await self.serve(4 * NUM_REQUESTS)
            if pairs <= self.pairs:
                return
        raise AssertionError(f"never together: {pairs - self.pairs}")

    async def _client(self, output: list[int]) -> None:
        prompt = [self.random.randrange(256) for _ in range(self.random.randint(100, 300))]
        self.num_requests += 1
        sampling = SamplingParams(NUM_TOKENS, temperature=0.0)
        generation = Generation(f"r{self.num_requests}", tuple(prompt), sampling, 60.0, "pair")
        try:
            async for event in self.fleet.orchestrator.generate(generation):
                output += event.token_ids
                if event.report is not None:
                    self.pairs.add((event.report.prefill, event.report.decode))
        except BatonError as error:
            self.outcomes["errors"] += 1
            print(f"{generation.request_id} after {len(output)} tokens: {error!r}")
        else:
            self.outcomes["finished"] += 1
            assert len(output) == NUM_TOKENS
            assert await asyncio.to_thread(are_greedy, self.model, prompt, output), generation.request_id

    async def _until(self, moment: str, outputs: list[list[int]]) -> None:
        """A random instant of a phase, as far as it shows from here."""
        num_tokens = {"opening": 0, "prefilling": 0, "transferring": 1, "decoding": self.random.randint(2, 30)}[moment]
        while max(map(len, outputs)) < num_tokens:
            await asyncio.sleep(0.001)
        await asyncio.sleep(self.random.uniform(0, {"opening": 0.01, "prefilling": 0.3}.get(moment, 0.03)))

    async def _restart(self, name: str) -> None:
        """What a supervisor does: the same replica id and addresses, another incarnation."""
        await self.ranks[name].wait()
        self.fleet._plane.forget(name)
        spec = replace(self.ranks[name].spec, incarnation=new_incarnation())
        self.ranks[name] = RankProcess(spec, self.folder)
        self.infos[name] = await self.ranks[name].start()
        self.fleet.register(self.infos[name])

    async def _until_quiet(self) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(QUIET_WITHIN_S + SLACK_S):
                while self._held():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"still held: {self._held()}") from None
        self.longest_quiet_s = max(self.longest_quiet_s, time.monotonic() - started)

    def _held(self) -> dict[str, object]:
        """By the reports of the replicas that run now, and the scheduler's own book."""
        admission, held = self.fleet.scheduler._admission, {}
        for name, info in self.infos.items():
            view = admission.fleet.get(name)
            if view is None or view.info.incarnation != info.incarnation or time.monotonic() - view.seen_at > 1.0:
                held[name] = "silent"
            elif view.status.num_waiting or view.status.num_running or view.status.num_free_blocks < info.num_blocks:
                held[name] = view.status
        if len(admission.reservations) or admission.num_waiting:
            held["scheduler"] = len(admission.reservations), admission.num_waiting
        return held


async def run_rounds(tiny_llama, tmp_path, num_rounds: int, seed: int) -> Processes:
    """Each round ends at rest; at the end nobody has more threads or descriptors than with all pairs connected."""
    path, model = tiny_llama
    roles = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
    specs = [replace(spec, transfer=TRANSFER) for name, role in roles.items() for spec in specs_of(name, role, 1, path)]
    ranks = {spec.replica_id: RankProcess(spec, tmp_path) for spec in specs}
    random_ = random.Random(seed)
    started = time.monotonic()
    async with rank_processes(list(ranks.values())) as infos, running_fleet(path, 0, 0, transfer=TRANSFER) as fleet:
        for info in infos.values():
            fleet.register(info)
        await fleet.until_ready(4)
        processes = Processes(fleet, tmp_path, ranks, infos, random_, model)
        try:
            await processes.connect_all()
            before = processes.usage()
            for number in range(num_rounds):
                victim = ("d0", "p0", "d1", "p1")[number % 4]
                sent = signal.SIGSTOP if number % 5 == 2 else signal.SIGKILL
                await processes.round(victim, sent, MOMENTS[(number + number // 4) % 4])
                print(number, victim, sent.name, processes.usage())
            await processes.serve(4 * NUM_REQUESTS)
            after = processes.usage()
            print(f"{num_rounds} rounds in {time.monotonic() - started:.1f} s, {dict(processes.outcomes)}")
            print(f"longest time to quiet {processes.longest_quiet_s:.1f} s")
            print(f"{before=}\n{after=}")
            for name in roles:
                assert after[name].num_fds <= before[name].num_fds + 2, name
                assert after[name].num_threads <= before[name].num_threads + IDLE_WORKERS, name
        finally:
            for rank in processes.ranks.values():
                rank.kill()
    return processes


@pytest.mark.timeout(180)
async def test_five_rounds(tiny_llama, tmp_path):
    await run_rounds(tiny_llama, tmp_path, 5, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_two_hundred_rounds(tiny_llama, tmp_path):
    await run_rounds(tiny_llama, tmp_path, 200, seed=2)

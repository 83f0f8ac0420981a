"""A fleet of made-up replicas for the scheduler's benchmark: loads, caches and prompts by chance, from a seed."""

import gc
import os
import random
import time
from collections.abc import Iterator

from cluster.scheduler.admission import Admission
from cluster.scheduler.policy import Choices
from core.block_hash import BlockHash
from core.config import SchedulerConfig
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import ReplicaStatus, Report, Reserve, StepSample

BLOCK_SIZE = 16
CHAIN = 62  # blocks of one prompt's cache: 992 tokens
SHARED = 20  # of these, a system prompt's
NUM_SYSTEM_PROMPTS = 16
NUM_EXTRA_HOLDERS = 2  # of every tenth chain
EVENT_BLOCKS = 100  # of a report
LAYOUT = KVLayout(32, 8, 128, BLOCK_SIZE, "bfloat16", 1)
COMPATIBILITY = Compatibility("model", "revision", "bfloat16", BLOCK_SIZE, "scheme")


class ScheduledFleet:
    """The production scheduler, told of `num_replicas`, half of them for prefill, that hold `num_blocks` together."""

    def __init__(self, num_replicas: int, num_blocks: int, seed: int) -> None:
        self.rng = random.Random(seed)
        # nobody falls silent, and no request waits out: time stands still
        self.admission = Admission(SchedulerConfig(replica_timeout_s=1e9, queue_limit=10**6))
        self.store_s = 0.0  # of the index, for all that is stored
        self.num_stored = 0  # blocks, each holder's counted
        self._num_requests = 0
        self._ids = [f"replica-{number}" for number in range(num_replicas)]
        for number, replica_id in enumerate(self._ids):
            self._register(replica_id, Role.PREFILL if number % 2 == 0 else Role.DECODE)
        self._system = [_keys(SHARED) for _ in range(NUM_SYSTEM_PROMPTS)]
        self._chains: dict[str, list[tuple[BlockHash, ...]]] = {replica_id: [] for replica_id in self._ids}
        self._fill(num_blocks)

    def request(self, num_blocks: int, *, is_hit: bool) -> Reserve:
        """A prompt of so many blocks: what some replica holds, or nothing that anybody does but a system prompt."""
        if is_hit:
            held = self._chains[self.rng.choice(self._ids)]
            chains = [self.rng.choice(held) for _ in range(-(-num_blocks // CHAIN))]
            hashes = tuple(key for chain in chains for key in chain)[:num_blocks]
        else:
            hashes = (*self.rng.choice(self._system), *_keys(num_blocks - SHARED))
        self._num_requests += 1
        return Reserve(f"request-{self._num_requests}", 0, "ingress", num_blocks * BLOCK_SIZE + 1, 200, hashes, 60.0)

    def decide(self, request: Reserve) -> tuple[float, float, float]:
        """Seconds of the match, of the decision on it, and of this thread's own for both; nothing is booked."""
        admission = self.admission
        prefills, decodes = (admission.fleet.in_generation(role, "", 0.0) for role in (Role.PREFILL, Role.DECODE))
        used_s, begun_at = time.thread_time(), time.perf_counter()
        matches = admission.index.match(request.block_hashes)
        matched_at = time.perf_counter()
        decision = admission.policy.decide(request, Choices(prefills, decodes, matches, 0.0, admission.fleet.by_id))
        ended_at = time.perf_counter()
        assert decision is not None
        return matched_at - begun_at, ended_at - matched_at, time.thread_time() - used_s

    def dispatch(self, request: Reserve) -> float:
        """Seconds from the queue to the booked plan."""
        self.admission.reserve(request, 0.0)
        begun_at = time.perf_counter()
        plans = self.admission.dispatch(0.0)
        seconds = time.perf_counter() - begun_at
        assert len(plans) == 1
        self.admission.finish(request.request_id, 0, 0.0)
        return seconds

    def remove_one(self) -> tuple[float, int]:
        """Seconds to forget a replica, and blocks that it held."""
        replica_id = self._ids[-1]
        num_held = len(self.admission.index.held_by(replica_id))
        begun_at = time.perf_counter()
        self.admission.replica_lost(replica_id)
        return time.perf_counter() - begun_at, num_held

    def _register(self, replica_id: str, role: Role) -> None:
        rng, is_decode = self.rng, role is Role.DECODE
        num_running = rng.randrange(20, 80) if is_decode else 0
        info = ReplicaInfo(
            replica_id, role, 1, ("address",), LAYOUT, COMPATIBILITY, 40_000, 256, 2048, 131_072,
            flop_per_s=989e12, read_bytes_per_s=3.35e12, num_active_parameters=8 * 10**9, parameter_bytes=16 * 10**9,
        )  # fmt: skip
        status = ReplicaStatus(0, num_running, 0, 20_000, 1000 * num_running, False, 0.0, 0.0, 0)
        self.admission.report(Report(info, 0, True, status, (), (), steps=tuple(self._steps(role))), 0.0)

    def _steps(self, role: Role) -> Iterator[StepSample]:
        rng = self.rng
        for _ in range(8):
            slow = rng.gauss(1, 0.03)
            if role is Role.DECODE:
                batch = rng.randrange(1, 128)
                yield 0, 0, batch, 1000 * batch, slow * (0.008 + 7e-5 * batch)
            tokens = rng.randrange(64, 2048)
            yield tokens, tokens * tokens // 2, 0, 0, slow * (0.006 + 3e-5 * tokens)

    def _fill(self, num_blocks: int) -> None:
        for replica_id in self._ids:
            self._store(replica_id, tuple(key for prompt in self._system for key in prompt))
        gc.freeze()  # as the scheduler's process does after the first reports
        num_chains = (num_blocks - SHARED * NUM_SYSTEM_PROMPTS) // (CHAIN - SHARED)
        for number in range(num_chains):
            chain = (*self._system[number % NUM_SYSTEM_PROMPTS], *_keys(CHAIN - SHARED))
            owner = self._ids[number % len(self._ids)]
            if len(self._chains[owner]) < 100:
                self._chains[owner].append(chain)
            extra = self.rng.sample(self._ids, NUM_EXTRA_HOLDERS) if number % 10 == 0 else []
            for replica_id in (owner, *extra):
                self._store(replica_id, chain[SHARED:])

    def _store(self, replica_id: str, keys: tuple[BlockHash, ...]) -> None:
        for first in range(0, len(keys), EVENT_BLOCKS):
            part = keys[first : first + EVENT_BLOCKS]
            begun_at = time.perf_counter()
            self.admission.index.store(replica_id, part)
            self.store_s += time.perf_counter() - begun_at
            self.num_stored += len(part)


def _keys(count: int) -> tuple[BlockHash, ...]:
    """Hashes of blocks: any 16 bytes."""
    raw = os.urandom(16 * count)
    return tuple(raw[start : start + 16] for start in range(0, 16 * count, 16))

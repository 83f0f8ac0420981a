"""A fleet as the autoscaler sees it, in place of one: a queue, prefill by rate, decode by batch. Pure, in small steps.

waits --room in both pools--> prefills (in order, all replicas as one) --> decodes (all at one pace) --> done
"""

from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta

from cluster.autoscaling.signals import FleetSignals, PoolSignals
from cluster.scheduler.workload_meter import WorkloadMeter
from core.messages.fleet import Role


@dataclass(frozen=True)
class PlantSpec:
    """What one replica can do; the defaults are of the order of an 8B model on one H100."""

    prefill_tokens_per_s: float = 12_000.0
    held_prompt_tokens: int = 16_384  # a prefill replica takes no more requests beyond this
    max_num_seqs: int = 64
    kv_tokens: int = 400_000
    itl_base_s: float = 0.012
    itl_per_request_s: float = 0.0003
    start_s: float = 60.0


@dataclass(eq=False)
class Request:
    """One request; `first_token_at` is NaN until then."""

    arrived_at: float
    num_prompt: int
    num_output: int
    planned_at: float = float("nan")
    first_token_at: float = float("nan")
    num_decoded: float = 0.0

    @property
    def ttft_s(self) -> float:
        """NaN while it waits."""
        return self.first_token_at - self.arrived_at


class ReplicaCount:
    """Of one pool: what was asked for is ready `start_s` later; what is given up is gone at once."""

    def __init__(self, num: int, start_s: float) -> None:
        self.num_ready = num
        self._start_s = start_s
        self._ready_at: deque[float] = deque()

    @property
    def num_target(self) -> int:
        """Ready and starting."""
        return self.num_ready + len(self._ready_at)

    def resize(self, num: int, now: float) -> None:
        """Starts or gives up replicas, those that start first."""
        while self.num_target < num:
            self._ready_at.append(now + self._start_s)
        while self.num_target > num:
            if self._ready_at:
                self._ready_at.pop()
            else:
                self.num_ready -= 1

    def advance(self, now: float) -> None:
        """Time passes."""
        while self._ready_at and self._ready_at[0] <= now:
            self._ready_at.popleft()
            self.num_ready += 1


class FleetPlant:
    """Feed it with `arrive`, move it with `advance`, read `signals`, and `resize` it."""

    def __init__(self, spec: PlantSpec, num_replicas: dict[Role, int], rate_window_s: float, wall: datetime) -> None:
        self.spec = spec
        self.now = 0.0
        self.pools = {role: ReplicaCount(num_replicas[role], spec.start_s) for role in Role}
        self.requests: list[Request] = []
        self.replica_s = 0.0
        self._wall = wall
        self._workload = WorkloadMeter(rate_window_s)
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._prefilled_tokens = 0.0  # of the first in line
        self._decoding: list[Request] = []

    @property
    def num_unfinished(self) -> int:
        """Requests in any state before done."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    @property
    def itl_s(self) -> float:
        """One decode step at the present batch; 0 without a batch."""
        if not self._decoding or not self._num_decodes:
            return 0.0
        return self.spec.itl_base_s + self.spec.itl_per_request_s * len(self._decoding) / self._num_decodes

    def arrive(self, num_prompt: int, num_output: int) -> None:
        """A request comes now."""
        request = Request(self.now, num_prompt, num_output)
        self.requests.append(request)
        self._waiting.append(request)
        self._workload.arrived(self.now)

    def resize(self, role: Role, num_replicas: int) -> None:
        """What Serve does at once."""
        self.pools[role].resize(num_replicas, self.now)

    def advance(self, step_s: float) -> None:
        """Time passes and work gets done."""
        self.now += step_s
        for pool in self.pools.values():
            pool.advance(self.now)
            self.replica_s += pool.num_target * step_s
        self._decode(step_s)
        self._plan()
        self._prefill(step_s)
        self._plan()

    def signals(self) -> FleetSignals:
        """As cluster.scheduler.fleet_signals reads them from the scheduler."""
        prefill_is_full, decode_is_full = self._prefill_is_full, self._decode_is_full(0)
        return FleetSignals(
            self.now,
            self._wall + timedelta(seconds=self.now),
            self._pool(Role.PREFILL, waited_for=prefill_is_full),
            self._pool(Role.DECODE, waited_for=decode_is_full or not prefill_is_full),
            self._workload.measured(self.now),
        )

    # ---- inside -------------------------------------------------------------------------------------------------

    @property
    def _num_decodes(self) -> int:
        return self.pools[Role.DECODE].num_ready

    @property
    def _outstanding_tokens(self) -> float:
        return sum(request.num_prompt for request in self._prefilling) - self._prefilled_tokens

    @property
    def _kv_tokens(self) -> float:
        decoding = sum(request.num_prompt + request.num_decoded for request in self._decoding)
        return decoding + sum(request.num_prompt for request in self._prefilling)

    @property
    def _prefill_is_full(self) -> bool:
        return self._outstanding_tokens >= self.pools[Role.PREFILL].num_ready * self.spec.held_prompt_tokens

    def _decode_is_full(self, num_prompt: int) -> bool:
        num_requests = len(self._prefilling) + len(self._decoding)
        kv_limit = 0.95 * self._num_decodes * self.spec.kv_tokens
        return num_requests >= self._num_decodes * self.spec.max_num_seqs or self._kv_tokens + num_prompt > kv_limit

    def _plan(self) -> None:
        while self._waiting and not self._prefill_is_full and not self._decode_is_full(self._waiting[0].num_prompt):
            request = self._waiting.popleft()
            request.planned_at = self.now
            self._workload.planned(request.num_prompt, request.num_prompt)
            self._prefilling.append(request)

    def _prefill(self, step_s: float) -> None:
        tokens = self.pools[Role.PREFILL].num_ready * self.spec.prefill_tokens_per_s * step_s
        while self._prefilling and self._prefilled_tokens + tokens >= self._prefilling[0].num_prompt:
            request = self._prefilling.popleft()
            tokens -= request.num_prompt - self._prefilled_tokens
            self._prefilled_tokens = 0.0
            alone_s = request.num_prompt / self.spec.prefill_tokens_per_s  # one replica computes one prompt
            request.first_token_at = max(self.now, request.planned_at + alone_s)
            self._decoding.append(request)
        self._prefilled_tokens += tokens if self._prefilling else 0.0

    def _decode(self, step_s: float) -> None:
        if not self._decoding or not self._num_decodes:
            return
        num_tokens = step_s / self.itl_s
        for request in self._decoding:
            request.num_decoded += num_tokens
            if request.num_decoded >= request.num_output:
                self._workload.decoded(self.now - request.first_token_at)
        self._decoding = [request for request in self._decoding if request.num_decoded < request.num_output]

    def _pool(self, role: Role, *, waited_for: bool) -> PoolSignals:
        pool, spec = self.pools[role], self.spec
        is_prefill, is_there = role is Role.PREFILL, pool.num_ready > 0
        capacity = pool.num_ready * spec.kv_tokens
        return PoolSignals(
            num_ready=pool.num_ready,
            num_target=pool.num_target,
            num_waiting=len(self._waiting) if waited_for else 0,
            queued_prompt_tokens=sum(request.num_prompt for request in self._waiting) if waited_for else 0,
            outstanding_prompt_tokens=round(self._outstanding_tokens) if is_prefill else 0,
            prefill_tokens_per_s=spec.prefill_tokens_per_s if is_there else 0.0,
            num_running=len(self._prefilling) if is_prefill else len(self._prefilling) + len(self._decoding),
            max_num_seqs=spec.max_num_seqs if is_there else 0,
            kv_usage=min(1.0, self._kv_tokens / capacity) if not is_prefill and capacity else 0.0,
            itl_s=0.0 if is_prefill else self.itl_s,
        )

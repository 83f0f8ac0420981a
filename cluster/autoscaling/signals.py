"""What sizing decisions are made from, and what they are."""

from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import Generic, TypeVar

from core.messages.fleet import Role

T = TypeVar("T")


@dataclass(frozen=True)
class PoolSignals:
    """One pool at one moment. `*_per_s` and `max_num_seqs` are of one replica, means over those that are ready."""

    num_ready: int  # replicas that take new work
    num_target: int  # replicas asked for; fewer are ready while some start, more until those that go begin to drain
    num_waiting: int  # requests that wait at the scheduler because this pool has no room
    queued_prompt_tokens: int  # of those, as far as they will be computed
    outstanding_prompt_tokens: int  # reserved or accepted by replicas, not yet computed
    prefill_tokens_per_s: float  # 0 while no replica is ready
    num_running: int  # requests that run or wait on replicas
    max_num_seqs: int  # 0 while no replica is ready
    kv_usage: float  # share of blocks in use, 0 to 1
    itl_s: float  # of busy replicas; 0 while unknown

    @property
    def num_starting(self) -> int:
        """Replicas that were asked for and are not ready."""
        return max(0, self.num_target - self.num_ready)


@dataclass(frozen=True)
class Workload:
    """Requests as they come, measured over the last `rate_window_s`."""

    requests_per_s: float
    prompt_tokens_per_request: float  # to compute, cached prefixes left out
    decode_s_per_request: float  # from first token to finish


@dataclass(frozen=True)
class FleetSignals:
    """Both pools at one moment."""

    now: float  # monotonic seconds
    wall: datetime  # with a time zone
    prefill: PoolSignals
    decode: PoolSignals
    workload: Workload

    def of(self, role: Role) -> PoolSignals:
        """The pool of a role."""
        return self.prefill if role is Role.PREFILL else self.decode

    @property
    def num_waiting(self) -> int:
        """Requests that wait at the scheduler, for whichever pool."""
        return max(self.prefill.num_waiting, self.decode.num_waiting)

    @property
    def predicted_ttft_s(self) -> float:
        """Of a request that comes now: all prompt tokens before it, and its own, at the pool's rate."""
        pool, own = self.prefill, self.workload.prompt_tokens_per_request
        backlog = pool.queued_prompt_tokens + pool.outstanding_prompt_tokens
        if not pool.num_ready or not pool.prefill_tokens_per_s:
            return inf if backlog else 0.0
        return (backlog / pool.num_ready + own) / pool.prefill_tokens_per_s


@dataclass(frozen=True)
class PerPool(Generic[T]):
    """Something of both pools."""

    prefill: T
    decode: T

    def of(self, role: Role) -> T:
        """That of a role's pool."""
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True)
class PoolDemand:
    """Replicas that a pool needs, fractions included: they tell how close the next one is."""

    num_replicas: float
    reason: str


@dataclass(frozen=True)
class PoolTarget:
    """Replicas that a pool shall have, and why in one line."""

    num_replicas: int
    reason: str


Demand = PerPool[PoolDemand]
"""What a policy wants, before limits, delays and budget."""

Targets = PerPool[PoolTarget]
"""The decision."""

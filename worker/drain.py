"""How a replica goes: what it still holds decides what it has to do now. Pure.

    SERVING --start--> DRAINING --no request left, or the deadline--> HANDING_OVER --at rest, or the grace--> DRAINED

Until the deadline requests may finish; those that are left then are handed over to other replicas. What moves on its
own (KV that decode still reads, transfers, messages) ends within `grace_s` after that, or is given up.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import inf


class DrainState(StrEnum):
    """See the picture above."""

    SERVING = "serving"
    DRAINING = "draining"
    HANDING_OVER = "handing over"
    DRAINED = "drained"


_LEGAL = {
    DrainState.SERVING: {DrainState.DRAINING},
    DrainState.DRAINING: {DrainState.HANDING_OVER},
    DrainState.HANDING_OVER: {DrainState.DRAINED},
    DrainState.DRAINED: set(),
}


class DrainOrder(StrEnum):
    """What to do now."""

    WAIT = "wait"  # until something that is held ends, and no longer than to `wake_at`
    HAND_OVER = "hand over"  # every request that is left, once
    END = "end"


@dataclass(frozen=True)
class Held:
    """What a replica holds at one moment."""

    num_requests: int  # still to be answered from here
    num_moving: int  # shares that decode still reads, transfers and messages under way: they end by themselves

    def __bool__(self) -> bool:
        return self.num_requests > 0 or self.num_moving > 0


class Drain:
    """The end of one replica. Times are the caller's clock, in seconds."""

    def __init__(self, grace_s: float) -> None:
        self.state = DrainState.SERVING
        self._grace_s = grace_s
        self._deadline = inf
        self._rest_by = inf

    @property
    def takes_work(self) -> bool:
        """False from the first `start` on."""
        return self.state is DrainState.SERVING

    @property
    def wake_at(self) -> float:
        """When `advance` has something new to say though nothing ended."""
        return self._deadline if self.state is DrainState.DRAINING else self._rest_by

    def start(self, now: float, timeout_s: float) -> None:
        """Takes no more work. Repeatable: the earliest deadline holds."""
        if self.state is DrainState.SERVING:
            self._to(DrainState.DRAINING)
        self._deadline = min(self._deadline, now + timeout_s)

    def advance(self, held: Held, now: float) -> DrainOrder:
        """What to do, given what is held; to be asked again after every order but END."""
        assert self.state is not DrainState.SERVING, "not started"
        if self.state is DrainState.DRAINING and (not held.num_requests or now >= self._deadline):
            self._to(DrainState.HANDING_OVER)
            self._rest_by = min(now, self._deadline) + self._grace_s
            if held.num_requests:
                return DrainOrder.HAND_OVER
        if self.state is DrainState.HANDING_OVER and (not held or now >= self._rest_by):
            self._to(DrainState.DRAINED)
        return DrainOrder.END if self.state is DrainState.DRAINED else DrainOrder.WAIT

    def validate(self) -> None:
        """Raises AssertionError when state and deadlines contradict each other."""
        assert (self._deadline == inf) == (self.state is DrainState.SERVING)
        assert (self._rest_by == inf) == (self.state in (DrainState.SERVING, DrainState.DRAINING))

    def _to(self, state: DrainState) -> None:
        """The one door to another state."""
        assert state in _LEGAL[self.state], f"drain: {self.state} -> {state}"
        self.state = state

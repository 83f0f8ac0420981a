"""What happens when, on a virtual clock. Pure.

Ties are broken so that the order does not depend on who came to plan what when: ends of engine steps come first, then
by who acts, then in the order in which that one planned. Skipping steps therefore changes no order.
"""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

STEP_END, MESSAGE, TIMER = range(3)  # ranks of events at one moment

_Event = tuple[float, int, int, int, Callable[..., None], tuple[Any, ...]]


class EventQueue:
    """The clock and the events to come; `now` is in seconds since the trace began."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._events: list[_Event] = []
        self._numbers = count()

    def at(self, time: float, rank: int, actor: int, action: Callable[..., None], *args: Any) -> None:
        """Calls `action` then; the past is now."""
        heapq.heappush(self._events, (max(time, self.now), rank, actor, next(self._numbers), action, args))

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Until there is nothing more to do, or `goes_on` says no."""
        events, pop = self._events, heapq.heappop
        while events and goes_on():
            self.now, _, _, _, action, args = pop(events)
            self.num_events += 1
            action(*args)

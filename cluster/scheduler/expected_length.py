"""How many tokens a request will generate, by those of its tenant that have ended. Pure."""

from bisect import bisect_right
from collections import deque
from itertools import accumulate

KEPT = 256  # requests of a tenant
FIRST_GUESS = 256  # tokens, before any has ended
GUESS_WEIGHT = 4  # ended requests that the guess counts as
SORT_EVERY = 8  # ended requests, once there are twice as many
MOST_TENANTS = 4096  # the least recently heard of are forgotten


class _History:
    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=KEPT)
        self._sorted: list[int] = []
        self._sums: list[int] = [0]
        self._num_new = 0

    def add(self, num_tokens: int) -> None:
        self._lengths.append(num_tokens)
        self._num_new += 1
        if self._num_new >= SORT_EVERY or len(self._lengths) <= 2 * SORT_EVERY:
            self._num_new = 0
            self._sorted = sorted(self._lengths)
            self._sums = [0, *accumulate(self._sorted)]

    def expected(self, limit: int) -> float:
        """Mean of min(length, limit)."""
        num_shorter = bisect_right(self._sorted, limit)
        total = self._sums[num_shorter] + limit * (len(self._sorted) - num_shorter)
        guess = GUESS_WEIGHT * min(FIRST_GUESS, limit)
        return (total + guess) / (len(self._sorted) + GUESS_WEIGHT)


class ExpectedLength:
    """By generation of the fleet, whose model it is, and tenant."""

    def __init__(self) -> None:
        self._histories: dict[tuple[str, str], _History] = {}

    def ended(self, generation: str, tenant: str, num_tokens: int) -> None:
        """A request came to its end after so many tokens."""
        key = generation, tenant
        history = self._histories.pop(key, None) or _History()
        self._histories[key] = history
        history.add(num_tokens)
        if len(self._histories) > MOST_TENANTS:
            del self._histories[next(iter(self._histories))]

    def of(self, generation: str, tenant: str, max_new_tokens: int) -> float:
        """The mean over its tenant's, none taken for longer than this one may become: never beyond the worst case."""
        history = self._histories.get((generation, tenant))
        return history.expected(max_new_tokens) if history is not None else float(min(FIRST_GUESS, max_new_tokens))

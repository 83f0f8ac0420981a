"""What the channels of one rank cost its device, and which of them to close for another. Pure.

    opened --use--> busy --rest--> idle --(least recently used first) evict--> closed

A channel that was just made is waited for: it is as good as busy until its first slab, or until `fresh_s` have passed.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass
class _Pair:
    num_bytes: int
    used_at: float
    num_users: int = 0
    is_fresh: bool = True


@dataclass
class PairBook:
    """Channels in both directions share one budget, in bytes."""

    budget_bytes: int
    idle_timeout_s: float  # longer idle, a channel goes at the next occasion: its peer may be gone for good
    fresh_s: float = 0.0
    _pairs: dict[Hashable, _Pair] = field(default_factory=dict)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._pairs

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def num_bytes(self) -> int:
        """What all channels cost now."""
        return sum(pair.num_bytes for pair in self._pairs.values())

    def victims(self, wanted_bytes: int, now: float) -> list[Hashable]:
        """Idle channels to close for another one: those idle too long, and the oldest until it fits.

        Closing them may not be enough; `fits` says so.
        """
        idle = sorted((pair.used_at, str(key), key) for key, pair in self._pairs.items() if self._is_idle(pair, now))
        excess = self.num_bytes + wanted_bytes - self.budget_bytes
        chosen = []
        for used_at, _, key in idle:
            if excess <= 0 and now - used_at < self.idle_timeout_s:
                break
            chosen.append(key)
            excess -= self._pairs[key].num_bytes
        return chosen

    def fits(self, wanted_bytes: int) -> bool:
        """Whether another one has room. A channel that costs more than the whole budget never fits."""
        return self.num_bytes + wanted_bytes <= self.budget_bytes

    def open(self, key: Hashable, num_bytes: int, now: float) -> None:
        """A channel begins to exist."""
        assert key not in self._pairs and self.fits(num_bytes)
        self._pairs[key] = _Pair(num_bytes, now)

    def use(self, key: Hashable) -> None:
        """One more slab is on its way; a channel in use is never a victim."""
        self._pairs[key].num_users += 1
        self._pairs[key].is_fresh = False

    def rest(self, key: Hashable, now: float) -> None:
        """One slab less; channels closed meanwhile are forgotten already."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.num_users -= 1
            pair.used_at = now
            assert pair.num_users >= 0

    def close(self, key: Hashable) -> None:
        """A channel is over, whoever ended it. Idempotent."""
        self._pairs.pop(key, None)

    def _is_idle(self, pair: _Pair, now: float) -> bool:
        return not pair.num_users and not (pair.is_fresh and now - pair.used_at < self.fresh_s)

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        assert self.num_bytes <= self.budget_bytes
        assert all(pair.num_users >= 0 for pair in self._pairs.values())

"""How far each one's work is after some time, where all are served at once by their weights until theirs is done. Pure.

work over weight   a ██████████████          level: what everyone has had by then over its weight, who wanted less
                   b █████|                  has had it all
                   c █████|███
"""

from bisect import bisect_right
from collections.abc import Iterable
from math import inf


class WaterLevel:
    """Of works in seconds, done one second each second, with their weights."""

    def __init__(self, works: Iterable[tuple[float, float]]) -> None:
        ordered = sorted((work_s / weight, weight) for work_s, weight in works)
        self._times, self._levels, self._weights = [0.0], [0.0], [sum(weight for _, weight in ordered)]
        for level, weight in ordered:
            self._times.append(self._times[-1] + (level - self._levels[-1]) * self._weights[-1])
            self._levels.append(level)
            self._weights.append(self._weights[-1] - weight)

    def after(self, seconds: float) -> float:
        """Of a work of weight w, `level * w` is done, if it is as long; inf: all are over."""
        last = bisect_right(self._times, seconds) - 1
        if last == len(self._times) - 1:
            return inf
        return self._levels[last] + (seconds - self._times[last]) / self._weights[last]

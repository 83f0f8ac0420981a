"""From a nervous demand to a calm target: not at all for a trifle, up soon, down late."""

from collections import deque
from math import ceil

from core.autoscaling_config import AutoscalingConfig

ROUNDING = 1e-9


def outside_dead_band(demand: float, current: int, dead_band: float) -> int:
    """Whole replicas for a demand, `current` of them while it is close to what they can do.

    n replicas become more when the demand exceeds n * (1 + dead_band), and n + 1 become n again when it is below
    n * (1 - dead_band): noise between the two moves nothing, whichever it was last.
    """
    if demand > current * (1 + dead_band) + ROUNDING:
        return ceil(demand - ROUNDING)
    return min(current, ceil(demand / (1 - dead_band) - ROUNDING))


class Smoothing:
    """The delays of one pool."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        self._recent: deque[tuple[float, int]] = deque()  # (when, wanted) over downscale_delay_s
        self._began_at: float | None = None
        self._above_since: float | None = None
        self._paused_until = float("-inf")

    def step(self, now: float, wanted: int, current: int) -> int:
        """The next number of replicas, where `current` are there or starting."""
        self._remember(now, wanted)
        if wanted <= current:
            self._above_since = None
            return self._down(now, current)
        if current == 0:
            return wanted  # somebody waits, and nobody is there
        if self._above_since is None:
            self._above_since = now
        return max(current, self._up(now, self._above_since))

    def _remember(self, now: float, wanted: int) -> None:
        self._began_at = now if self._began_at is None else self._began_at
        self._recent.append((now, wanted))
        while self._recent[0][0] < now - self._config.downscale_delay_s:
            self._recent.popleft()

    def _up(self, now: float, above_since: float) -> int:
        """To what was wanted throughout the delay, once that is over."""
        since = now - self._config.upscale_delay_s
        if above_since > since:
            return 0
        return min((wanted for at, wanted in self._recent if at >= since), default=0)

    def _down(self, now: float, current: int) -> int:
        """A step towards the most that was wanted within the delay; all of the delay must have been seen."""
        assert self._began_at is not None, "step() remembers before it decides"
        if now < self._paused_until or now - self._began_at < self._config.downscale_delay_s:
            return current
        most = max(wanted for _, wanted in self._recent)
        target = max(most, current - self._config.downscale_step)
        if target < current:
            self._paused_until = now + self._config.downscale_pause_s
        return min(target, current)

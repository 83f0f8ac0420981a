"""How many requests come and what each one takes, measured as they pass the scheduler. Pure."""

from math import exp

from cluster.autoscaling.signals import Workload
from worker.rates import MovingAverage

SAMPLE_WEIGHT = 0.05  # of one request in the means: they follow the last twenty or so
FORGOTTEN = 0.01  # arrivals decayed to less than this count as none, so that an idle fleet reads exactly 0


class WorkloadMeter:
    """The arrival rate decays with `window_s`: after a step of the load it has 63 % of the way behind it by then.

    For Poisson arrivals at `rate` the estimate's relative deviation is 1 / sqrt(2 * rate * window_s).
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._arrivals = 0.0
        self._decayed_at = 0.0
        self._prompt_tokens = MovingAverage(SAMPLE_WEIGHT)
        self._uncached_tokens = MovingAverage(SAMPLE_WEIGHT)
        self._decode_s = MovingAverage(SAMPLE_WEIGHT)

    @property
    def uncached_share(self) -> float:
        """Of a prompt's tokens, those that must be computed; 1 while unknown."""
        return min(1.0, self._uncached_tokens.value / self._prompt_tokens.value) if self._prompt_tokens.value else 1.0

    def arrived(self, now: float) -> None:
        """A request came for the first time."""
        self._decay(now)
        self._arrivals += 1

    def planned(self, num_prompt_tokens: int, num_uncached_tokens: int) -> None:
        """A request was given a plan."""
        self._prompt_tokens.add(num_prompt_tokens)
        self._uncached_tokens.add(num_uncached_tokens)

    def decoded(self, decode_s: float) -> None:
        """A request ended so long after its first token."""
        self._decode_s.add(decode_s)

    def measured(self, now: float) -> Workload:
        """The estimates at this moment."""
        self._decay(now)
        return Workload(self._arrivals / self._window_s, self._uncached_tokens.value, self._decode_s.value)

    def _decay(self, now: float) -> None:
        self._arrivals *= exp(-(now - self._decayed_at) / self._window_s)
        self._decayed_at = now
        if self._arrivals < FORGOTTEN:
            self._arrivals = 0.0

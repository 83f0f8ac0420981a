"""How long a request will wait for its plan, by how fast plans were given while others waited. Pure."""

from math import exp

WINDOW_S = 20.0
LEAST_SECONDS = 1.0  # of waiting seen, before anything is foretold
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 600.0


class WaitForecast:
    """Prompt tokens dispatched per second of waiting, older ones counting less."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0
        self._seen_at: float | None = None

    def passed(self, now: float, somebody_waited: bool) -> None:
        """Time went by since the last call; only while somebody waits is the rate of dispatch what the fleet can do."""
        if self._seen_at is not None and now > self._seen_at and somebody_waited:
            elapsed_s = now - self._seen_at
            fading = exp(-elapsed_s / WINDOW_S)
            self._num_tokens *= fading
            self._seconds = self._seconds * fading + elapsed_s
        self._seen_at = now

    def dispatched(self, num_tokens: int) -> None:
        """A request that had waited got its plan."""
        self._num_tokens += num_tokens

    def wait_s(self, num_tokens: float, num_moving: int) -> float | None:
        """Until so many prompt tokens are dispatched; None while nobody can say.

        At least `num_moving` count as dispatched: what is computed now, or the next request if it got its plan now. One
        long prompt holds up whoever comes behind it, and is no sign of a fleet that stands still.
        """
        if self._seconds < LEAST_SECONDS:
            return None
        return num_tokens * self._seconds / max(self._num_tokens, num_moving)

    def retry_after_s(self, wait_s: float | None, limit_s: float) -> float:
        """When to come back so as to wait `limit_s` at most, if as many leave as come until then."""
        if wait_s is None:
            return LEAST_RETRY_S
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, wait_s - limit_s))

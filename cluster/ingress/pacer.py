"""How fast an attempt's tokens come, from when each of its events did. Pure.

prefill's token     decode's first ...           ... and last event
|---- handoff_s ----|------- itl_s times tokens ------|
"""

from core.messages.to_scheduler import TokenPace

_Mark = tuple[float, int]  # when an event came, and how many tokens there were then


class Pacer:
    """Of one attempt. The handoff is not part of the pace: it is not longer for a longer answer."""

    def __init__(self) -> None:
        self._prefilled_at: float | None = None
        self._first: _Mark | None = None  # decode's events
        self._last: _Mark | None = None

    def prefilled(self, now: float) -> None:
        """Prefill's token came."""
        self._prefilled_at = now

    def decoded(self, num_tokens: int, now: float) -> None:
        """An event of decode came; with it there are so many tokens, over all attempts. Repeated ones count once."""
        if self._first is None:
            self._first = now, num_tokens
        if self._last is None or num_tokens > self._last[1]:
            self._last = now, num_tokens

    def pace(self) -> TokenPace:
        """Until now."""
        if self._first is None or self._last is None:
            return TokenPace()
        handoff_s = None if self._prefilled_at is None else max(0.0, self._first[0] - self._prefilled_at)
        num_further = self._last[1] - self._first[1]
        return TokenPace(handoff_s, (self._last[0] - self._first[0]) / num_further if num_further else None)

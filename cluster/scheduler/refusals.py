"""Who is refused rather than wait in vain, who is pushed out of a full line, and when they shall come back. Pure."""

from cluster.scheduler.reservations import Reservations
from cluster.scheduler.wait_forecast import WaitForecast
from cluster.scheduler.waiting_line import Waiting, WaitingLine
from core.errors import Overloaded


class Refusals:
    """Of one line, by how fast it moved."""

    def __init__(self, line: WaitingLine, reservations: Reservations, queue_limit: int) -> None:
        self._line = line
        self._reservations = reservations
        self._queue_limit = queue_limit
        self._forecast = WaitForecast()
        self._pushed_out: dict[str, Overloaded] = {}  # not told yet

    def passed(self, now: float) -> None:
        """Before anything changes in the line."""
        self._forecast.passed(now, len(self._line) > 0)

    def dispatched(self, waiting: Waiting, now: float) -> None:
        """It has its plan."""
        if now > waiting.since:
            self._forecast.dispatched(waiting.request.num_tokens)

    def require_a_hope(self, waiting: Waiting) -> None:
        """Raises Overloaded for a request that would wait in vain: it is told now, not when its time is over."""
        wait_s = self._wait_s(waiting) if self._line else None
        if wait_s is not None and wait_s > waiting.timeout_s:
            raise self.overloaded(
                waiting, f"a wait of {wait_s:.0f} s is foreseen, {waiting.timeout_s:.0f} s are allowed"
            )

    def require_room(self, newest: Waiting) -> None:
        """In a full line who fills it beyond its part loses its last request. Raises Overloaded for `newest`."""
        if len(self._line) <= self._queue_limit:
            return
        last = self._line.last_of_the_longest()
        self._line.remove(last.request.request_id)
        error = self.overloaded(last, f"{self._queue_limit} requests wait already")
        if last is newest:
            raise error
        self._pushed_out[last.request.request_id] = error

    def take_pushed_out(self) -> dict[str, Overloaded]:
        """Since the last call."""
        taken, self._pushed_out = self._pushed_out, {}
        return taken

    def overloaded(self, waiting: Waiting, message: str) -> Overloaded:
        """With an honest Retry-After."""
        return Overloaded(message, retry_after_s=self.retry_after_s(waiting))

    def retry_after_s(self, waiting: Waiting) -> float:
        """When to come back, by how many wait before it."""
        return self._forecast.retry_after_s(self._wait_s(waiting), waiting.timeout_s)

    def _wait_s(self, waiting: Waiting) -> float | None:
        """Foreseen; who will not be in time will have been put off by then."""
        num_next = next(self._line.in_order(), waiting).request.num_tokens
        num_moving = max(num_next, self._reservations.num_prompt_tokens)
        wait_s = self._forecast.wait_s(self._line.tokens_before(waiting), num_moving)
        if wait_s is not None and waiting.since + wait_s > waiting.due_at:
            wait_s = self._forecast.wait_s(self._line.tokens_before(waiting.as_put_off()), num_moving)
        return wait_s

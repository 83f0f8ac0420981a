"""Remembers which attempts of which requests are over, so that what arrives late is refused. Pure."""

from collections import OrderedDict

from core.errors import StaleMessage


class Tombstones:
    """request id -> highest ended attempt; forgotten after `keep_s` or beyond `limit` entries, oldest first."""

    def __init__(self, keep_s: float = 120.0, limit: int = 100_000) -> None:
        self._keep_s = keep_s
        self._limit = limit
        self._ended: OrderedDict[str, tuple[int, float]] = OrderedDict()  # ordered by time of burial

    def bury(self, request_id: str, attempt: int, now: float) -> None:
        """This attempt and all lower ones are over."""
        previous, _ = self._ended.pop(request_id, (attempt, now))
        self._ended[request_id] = (max(previous, attempt), now)
        while self._ended:
            oldest, (_, buried_at) = next(iter(self._ended.items()))
            if now - buried_at < self._keep_s and len(self._ended) <= self._limit:
                break
            del self._ended[oldest]

    def refuse(self, request_id: str, attempt: int) -> None:
        """Raises StaleMessage when the attempt is over."""
        ended = self._ended.get(request_id)
        if ended is not None and attempt <= ended[0]:
            raise StaleMessage(f"attempt {attempt} of request {request_id} is over")

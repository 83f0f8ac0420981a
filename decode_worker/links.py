"""How fast KV comes in from each prefill replica. Pure."""

from core.messages.to_rank import Fetched
from core.messages.to_scheduler import LinkStatus
from worker.rates import MovingAverage


class _Link:
    def __init__(self) -> None:
        self.bytes_per_s = MovingAverage()
        self.num_bytes = 0
        self.num_transfers = 0
        self.num_digests = 0
        self.num_corrupt = 0


class Links:
    """One measured link per source; those of replicas that are gone are forgotten, oldest use first."""

    def __init__(self, limit: int = 64) -> None:
        self._links: dict[str, _Link] = {}
        self._limit = limit
        self._status: tuple[LinkStatus, ...] | None = ()  # None: something changed since it was made

    def add(self, source_id: str, fetched: Fetched) -> None:
        """Takes one finished transfer in."""
        if not fetched.num_bytes or fetched.seconds <= 0:
            return
        link = self._used(source_id)
        link.bytes_per_s.add(fetched.num_bytes / fetched.seconds)
        link.num_bytes += fetched.num_bytes
        link.num_transfers += 1
        link.num_digests += fetched.num_digests

    def corrupt(self, source_id: str) -> None:
        """A transfer brought other bytes than were sent."""
        self._used(source_id).num_corrupt += 1

    def status(self) -> tuple[LinkStatus, ...]:
        """By source id."""
        if self._status is None:
            self._status = tuple(
                LinkStatus(
                    source_id,
                    link.bytes_per_s.value,
                    link.num_bytes,
                    link.num_transfers,
                    link.num_digests,
                    link.num_corrupt,
                )
                for source_id, link in sorted(self._links.items())
            )
        return self._status

    def _used(self, source_id: str) -> _Link:
        self._status = None
        link = self._links.pop(source_id, None) or _Link()
        self._links[source_id] = link
        if len(self._links) > self._limit:
            del self._links[next(iter(self._links))]
        return link

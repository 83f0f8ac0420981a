"""Bytes of KV that are on their way, by the replica that sends and the one that receives. Pure.

What is booked sets out; it has arrived when the receiver's reports count as many bytes from that sender, the oldest
request's first, or say that no handoff is open there any more. So what a link does not bring stays before others that
would take it, long before a first transfer tells how slow it is.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable

from core.messages.to_scheduler import LinkStatus

Pair = tuple[str, str]  # who sends, who receives


class Flights:
    """Transfers that share an end share its speed: one waits for those before it at either end."""

    def __init__(self) -> None:
        self.sent: defaultdict[str, int] = defaultdict(int)
        self.received: defaultdict[str, int] = defaultdict(int)
        self._pairs: dict[str, Pair] = {}  # by request
        self._flying: dict[Pair, OrderedDict[str, int]] = {}  # bytes by request, the oldest first
        self._counted: dict[Pair, int] = {}  # bytes that the receiver has reported, since it started
        self._computed: set[str] = set()  # requests whose prefill is over

    def begin(self, request_id: str, source_id: str, destination_id: str, num_bytes: int) -> None:
        """A request's KV will go this way."""
        self.end(request_id)
        if num_bytes:
            pair = self._pairs[request_id] = source_id, destination_id
            self._flying.setdefault(pair, OrderedDict())[request_id] = num_bytes
            self.sent[source_id] += num_bytes
            self.received[destination_id] += num_bytes

    def computed(self, request_id: str) -> None:
        """Its prefill is over: what has not arrived yet is under way."""
        if request_id in self._pairs:
            self._computed.add(request_id)

    def end(self, request_id: str) -> None:
        """It has arrived, or will not; idempotent."""
        pair = self._pairs.get(request_id)
        if pair is not None:
            self._land(pair, request_id, self._flying[pair][request_id])

    def heard(self, destination_id: str, links: Iterable[LinkStatus], num_open: int) -> None:
        """A receiver's report: what it counts of each link, and how many requests it has that have not joined."""
        for link in links:
            pair = link.source_id, destination_id
            before = self._counted.get(pair, 0)
            self._counted[pair] = link.num_bytes
            came = link.num_bytes - (before if link.num_bytes >= before else 0)
            flying = self._flying.get(pair)
            while came > 0 and flying:
                request_id, num_bytes = next(iter(flying.items()))
                self._land(pair, request_id, min(came, num_bytes))
                came -= num_bytes
        if not num_open and destination_id in self.received:
            here = [request_id for request_id in self._computed if self._pairs[request_id][1] == destination_id]
            for request_id in here:
                self.end(request_id)

    def lost(self, replica_id: str) -> None:
        """A replica is gone, and all that it sends or receives."""
        for request_id, pair in list(self._pairs.items()):
            if replica_id in pair:
                self.end(request_id)
        self._counted = {pair: count for pair, count in self._counted.items() if replica_id not in pair}

    def before(self, source_id: str, destination_id: str) -> int:
        """Bytes that a new transfer finds before it."""
        return max(self.sent.get(source_id, 0), self.received.get(destination_id, 0))

    def _land(self, pair: Pair, request_id: str, num_bytes: int) -> None:
        flying = self._flying[pair]
        flying[request_id] -= num_bytes
        for sums, replica_id in ((self.sent, pair[0]), (self.received, pair[1])):
            sums[replica_id] -= num_bytes
            if not sums[replica_id]:
                del sums[replica_id]
        if not flying[request_id]:
            del flying[request_id], self._pairs[request_id]
            self._computed.discard(request_id)
            if not flying:
                del self._flying[pair]

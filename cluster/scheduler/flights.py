"""Bytes of KV that are on their way, by the replica that sends and the one that receives. Pure."""

from collections import defaultdict


class Flights:
    """Transfers that share an end share its speed: one waits for those before it at either end."""

    def __init__(self) -> None:
        self.sent: defaultdict[str, int] = defaultdict(int)
        self.received: defaultdict[str, int] = defaultdict(int)
        self._of: dict[str, tuple[str, str, int]] = {}  # by request

    def begin(self, request_id: str, source_id: str, destination_id: str, num_bytes: int) -> None:
        """A request's KV will go this way."""
        self.end(request_id)
        if num_bytes:
            self._of[request_id] = source_id, destination_id, num_bytes
            self.sent[source_id] += num_bytes
            self.received[destination_id] += num_bytes

    def end(self, request_id: str) -> None:
        """It has arrived, or will not; idempotent."""
        known = self._of.pop(request_id, None)
        if known is not None:
            for sums, replica_id in ((self.sent, known[0]), (self.received, known[1])):
                sums[replica_id] -= known[2]
                if not sums[replica_id]:
                    del sums[replica_id]

    def before(self, source_id: str, destination_id: str) -> int:
        """Bytes that a new transfer finds before it."""
        return max(self.sent.get(source_id, 0), self.received.get(destination_id, 0))

"""What a link is taken to cost before anything has moved over it, by what is known of its two ends. Pure."""

from typing import NamedTuple

from core.messages.fleet import ReplicaInfo

LINK_BYTES_PER_S = 1.5e9  # where replicas do not say what their ports can do
PORT_SHARE = 0.8  # of that
HOST_BYTES_PER_S = 5e9  # within a host: through its memory at least
LINK_LATENCY_S = 0.002


class LinkCost(NamedTuple):
    """Seconds before the first byte, and for each."""

    latency_s: float
    byte_s: float


GUESSED = LinkCost(LINK_LATENCY_S, 1 / LINK_BYTES_PER_S)
WITHIN_HOST = LinkCost(LINK_LATENCY_S, 1 / HOST_BYTES_PER_S)


class LinkEnd:
    """One replica's. A plain class: each decision asks many."""

    __slots__ = ("host", "replica_id", "through_port", "zone")

    def __init__(self, info: ReplicaInfo) -> None:
        self.replica_id = info.replica_id
        self.zone = info.zone
        self.host = info.address.rpartition(":")[0] or info.address
        port = info.port_bytes_per_s
        self.through_port = LinkCost(LINK_LATENCY_S, 1 / (PORT_SHARE * port)) if port else GUESSED

    def guess(self, source: "LinkEnd") -> LinkCost:
        """Of what comes here from there: by the slower of two ports."""
        if source.host == self.host:
            return WITHIN_HOST
        return max(self.through_port, source.through_port)

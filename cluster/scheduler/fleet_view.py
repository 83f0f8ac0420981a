"""What the scheduler knows of each replica: its last report, and the reservations that it holds there. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log2

from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import ReplicaStatus

ROOFLINE_PREFILL_TOKENS_PER_S = 2000.0  # until a replica has reported its own


@dataclass(eq=False)
class ReplicaView:
    """One replica. Reservations count at once, reports lag behind; the larger of the two is believed."""

    info: ReplicaInfo
    status: ReplicaStatus
    seen_at: float
    prefill_tokens: dict[str, int] = field(default_factory=dict)  # request id -> uncached tokens reserved here
    decode_requests: dict[str, int] = field(default_factory=dict)  # request id -> blocks it may still claim here

    @property
    def outstanding_prefill_tokens(self) -> int:
        """Prompt tokens that stand before a new request."""
        return max(self.status.num_waiting_tokens, sum(self.prefill_tokens.values()))

    @property
    def prefill_tokens_per_s(self) -> float:
        """Recent rate, or a guess."""
        return self.status.prefill_tokens_per_s or ROOFLINE_PREFILL_TOKENS_PER_S

    @property
    def num_decode_requests(self) -> int:
        """Requests that run or wait on this decode replica."""
        return max(self.status.num_running + self.status.num_waiting, len(self.decode_requests))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new request can count on."""
        return self.status.num_free_blocks - sum(self.decode_requests.values())

    def bytes_per_s_from(self, source_id: str) -> float:
        """Measured speed of KV from a replica, to the nearest power of two: less is noise; 0 while unknown."""
        for link in self.status.links:
            if link.source_id == source_id and link.bytes_per_s > 0:
                return float(2 ** round(log2(link.bytes_per_s)))
        return 0.0

    @property
    def num_reservations(self) -> int:
        """Requests that were sent here and have not left."""
        return len(self.prefill_tokens) + len(self.decode_requests)


class FleetView:
    """All replicas that reported within the timeout."""

    def __init__(self, replica_timeout_s: float) -> None:
        self._timeout_s = replica_timeout_s
        self._replicas: dict[str, ReplicaView] = {}

    def __iter__(self) -> Iterator[ReplicaView]:
        return iter(self._replicas.values())

    def get(self, replica_id: str) -> ReplicaView | None:
        """The replica, reachable or not."""
        return self._replicas.get(replica_id)

    def update(self, info: ReplicaInfo, status: ReplicaStatus, now: float) -> bool:
        """Takes a report in; True when it comes from a new replica or incarnation."""
        known = self._replicas.get(info.replica_id)
        if known is None or known.info.incarnation != info.incarnation:
            self._replicas[info.replica_id] = ReplicaView(info, status, now)
            return True
        known.info, known.status, known.seen_at = info, status, now
        return False

    def remove(self, replica_id: str) -> None:
        """The replica is gone."""
        self._replicas.pop(replica_id, None)

    def usable(self, role: Role, now: float) -> list[ReplicaView]:
        """Replicas of a pool that live and take new work."""
        return [
            replica
            for replica in self._replicas.values()
            if replica.info.role is role and not replica.status.draining and now - replica.seen_at <= self._timeout_s
        ]

"""Round robin: each replica in turn, those without room passed over. Pure."""

from collections.abc import Mapping, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import Reserve


class RoundRobin:
    """The next id after the last one chosen, the first one after the last."""

    def __init__(self) -> None:
        self._last = ""

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule."""
        later = [replica for replica in replicas if replica.info.replica_id > self._last]
        return (later or replicas)[0]

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """Whose turn it was."""
        self._last = replica.info.replica_id

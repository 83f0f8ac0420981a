"""Least outstanding requests: whoever has the fewest requests that have not ended. Pure."""

from collections.abc import Mapping, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import Stateless, num_outstanding


class LeastOutstanding(Stateless):
    """Ties go to the lower id."""

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule."""
        return min(replicas, key=num_outstanding)

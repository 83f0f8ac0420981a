"""Power of two choices (Mitzenmacher, 2001): of two replicas drawn by chance, the one with fewer requests. Pure."""

from collections.abc import Mapping, Sequence
from random import Random

from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import Stateless, num_outstanding


class PowerOfTwo(Stateless):
    """Ties go to the one that was drawn first."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule."""
        return min(self._chance.sample(replicas, min(2, len(replicas))), key=num_outstanding)

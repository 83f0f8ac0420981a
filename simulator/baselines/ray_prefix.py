"""Ray Serve LLM's prefix-cache-affinity router. Pure.

    queues balanced (most - least <= 10):  match rate >= 10 %  -> the best matching replica
                                           else                -> the one with the least in its prefix tree
    else                                                       -> power of two choices by queue length

Source: PrefixCacheAffinityRouter of ray-project/ray.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random

from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import num_cached_tokens, num_outstanding

MOST_SPREAD = 10
LEAST_MATCH = 0.1


class RayPrefix:
    """Ties go to the lower id."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)
        self._tree_tokens: defaultdict[str, int] = defaultdict(int)
        self._new_tokens = 0  # of the last choice

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule."""
        loads = [num_outstanding(replica) for replica in replicas]
        if max(loads) - min(loads) > MOST_SPREAD:
            found = min(self._chance.sample(replicas, min(2, len(replicas))), key=num_outstanding)
        else:
            found = max(replicas, key=lambda replica: num_cached_tokens(request, replica, cached))
            if num_cached_tokens(request, found, cached) / request.num_tokens < LEAST_MATCH:
                found = min(replicas, key=lambda replica: self._tree_tokens[replica.info.replica_id])
        self._new_tokens = request.num_tokens - num_cached_tokens(request, found, cached)
        return found

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """Its tree grows."""
        self._tree_tokens[replica.info.replica_id] += self._new_tokens

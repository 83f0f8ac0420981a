"""The SGLang gateway's cache-aware routing. Pure.

    imbalanced when  most - least load > 64  and  most > 1.5 * least      -> the least loaded, whatever is cached
    otherwise: best match rate > 0.3                                      -> the best matching
               else                                                       -> the one with the smallest tree

The balance check is fleet-wide: one hot worker turns cache routing off for all. Loads are outstanding requests; trees
grow by what is sent to a worker.
Source: the cache_aware policy of sgl-project/sglang, sgl-model-gateway.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import num_cached_tokens, num_outstanding

ABSOLUTE = 64
RELATIVE = 1.5
LEAST_MATCH = 0.3


class SGLangGateway:
    """Ties go to the lower id."""

    def __init__(self) -> None:
        self._tree_tokens: defaultdict[str, int] = defaultdict(int)
        self._new_tokens = 0  # of the last choice

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule."""
        loads = [num_outstanding(replica) for replica in replicas]
        found = max(replicas, key=lambda replica: num_cached_tokens(request, replica, cached))
        if max(loads) - min(loads) > ABSOLUTE and max(loads) > RELATIVE * min(loads):
            found = min(replicas, key=num_outstanding)
        elif num_cached_tokens(request, found, cached) / request.num_tokens <= LEAST_MATCH:
            found = min(replicas, key=lambda replica: self._tree_tokens[replica.info.replica_id])
        self._new_tokens = request.num_tokens - num_cached_tokens(request, found, cached)
        return found

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """Its tree grows."""
        self._tree_tokens[replica.info.replica_id] += self._new_tokens

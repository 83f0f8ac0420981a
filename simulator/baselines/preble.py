"""Preble's E2, exploitation and exploration (Srivatsa et al., ICLR 2025). Pure.

    exploit: cached tokens > new tokens -> the replica with the longest prefix
    explore: otherwise                  -> the replica with the least load over the last 3 minutes
    rebalance: when the exploited replica has more than 1.5 times the least load, the least loaded takes the request

Load is counted in tokens to compute and to generate of the requests that were sent there.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import num_cached_tokens

WINDOW_S = 180.0
IMBALANCE = 1.5


class Preble:
    """Ties go to the lower id."""

    def __init__(self) -> None:
        self._sent: deque[tuple[float, str, int]] = deque()
        self._loads: defaultdict[str, int] = defaultdict(int)  # tokens of the window, by replica id
        self._new_tokens = 0  # of the last choice

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule."""
        self._forget(now)
        best = max(replicas, key=lambda replica: num_cached_tokens(request, replica, cached))
        calmest = min(replicas, key=self._load)
        num_cached = num_cached_tokens(request, best, cached)
        exploits = num_cached > request.num_tokens - num_cached
        found = best if exploits and self._load(best) <= IMBALANCE * max(1, self._load(calmest)) else calmest
        self._new_tokens = request.num_tokens - num_cached_tokens(request, found, cached)
        return found

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """Adds to its load."""
        replica_id, num_tokens = replica.info.replica_id, self._new_tokens + request.max_new_tokens
        self._sent.append((now, replica_id, num_tokens))
        self._loads[replica_id] += num_tokens

    def _load(self, replica: ReplicaView) -> int:
        return self._loads[replica.info.replica_id]

    def _forget(self, now: float) -> None:
        while self._sent and now - self._sent[0][0] > WINDOW_S:
            _, replica_id, num_tokens = self._sent.popleft()
            self._loads[replica_id] -= num_tokens

"""Session affinity: a conversation stays where its last turn was, new ones go where the fewest requests are. Pure.

A conversation is known by its prompt: one that goes on begins with what was its whole prompt the turn before.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.block_hash import BlockHash
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import num_outstanding


class SessionStick:
    """Remembers the last `limit` conversations by their prompts' last full blocks."""

    def __init__(self, limit: int = 100_000) -> None:
        self._limit = limit
        self._homes: OrderedDict[BlockHash, str] = OrderedDict()

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """See Rule. One whose home has no room goes elsewhere, and stays there."""
        home = next((self._homes[key] for key in reversed(request.block_hashes) if key in self._homes), "")
        at_home = [replica for replica in replicas if replica.info.replica_id == home]
        return at_home[0] if at_home else min(replicas, key=num_outstanding)

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """Where its next turn shall go."""
        if not request.block_hashes:
            return
        self._homes.pop(request.block_hashes[-1], None)
        self._homes[request.block_hashes[-1]] = replica.info.replica_id
        if len(self._homes) > self._limit:
            self._homes.popitem(last=False)

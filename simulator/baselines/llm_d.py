"""The llm-d inference scheduler's scorers: decode first, prefill only for a long uncached suffix. Pure.

    prefix score = w * min(1, cached tokens / 8192)^2 + (1 - w) * cached share of the prompt
    kv score     = 1 - KV usage
    queue score  = 1 - waiting requests / most waiting requests
    score        = 2 * prefix + kv + queue                    a replica whose metrics are stale scores as saturated: 0

Remote prefill only if the uncached suffix on the chosen decode replica is at least `threshold` tokens.
Source: scorers of llm-d/llm-d-inference-scheduler and of the Gateway API inference extension.
"""

from collections.abc import Callable, Mapping, Sequence

from cluster.scheduler.candidate import Decision
from cluster.scheduler.policy import Choices, Memoryless
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import (
    decodes_with_room,
    make_decision,
    num_cached_tokens,
    num_outstanding,
    ready_prefills,
)

LONG_TOKENS = 8192
Score = Callable[[ReplicaView], float]


class LlmD(Memoryless):
    """Ties go to the lower id."""

    def __init__(
        self, max_kv_usage: float, stale_s: float = 0.2, threshold: int = 256, long_weight: float = 0.5
    ) -> None:
        self._max_kv_usage = max_kv_usage
        self._stale_s = stale_s
        self._threshold = threshold
        self._long_weight = long_weight

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """See Policy."""
        cached, now = choices.cached, choices.now
        is_local = not choices.prefills or request.placement == "local"
        decodes = decodes_with_room(request, choices.decodes, self._max_kv_usage, local=is_local)
        if not decodes:
            return None
        decode = max(decodes, key=self.scorer(request, decodes, cached, now))
        uncached = request.num_tokens - num_cached_tokens(request, decode, cached)
        if is_local:
            return make_decision(request, None, decode, cached, "local_no_prefill")
        if uncached < self._threshold and decodes_with_room(request, [decode], self._max_kv_usage, local=True):
            return make_decision(request, None, decode, cached, "local_short")
        ready = [p for p in ready_prefills(request, choices.prefills) if can_pair(p.info, decode.info)]
        if not ready:
            return None
        prefill = max(ready, key=self.scorer(request, ready, cached, now))
        return make_decision(request, prefill, decode, cached, "pair")

    def scorer(self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float) -> Score:
        """Scores of replicas among each other."""
        most = max(map(num_outstanding, replicas))

        def score(replica: ReplicaView) -> float:
            if now - replica.seen_at > self._stale_s:
                return 0.0
            usage = 1 - max(0, replica.num_free_blocks) / replica.info.num_blocks
            queue = 1 - num_outstanding(replica) / most if most else 1.0
            return 2 * self.prefix_score(request, num_cached_tokens(request, replica, cached)) + (1 - usage) + queue

        return score

    def prefix_score(self, request: Reserve, num_cached: int) -> float:
        """0 to 1."""
        is_long = min(1.0, num_cached / LONG_TOKENS) ** 2
        return self._long_weight * is_long + (1 - self._long_weight) * num_cached / request.num_tokens

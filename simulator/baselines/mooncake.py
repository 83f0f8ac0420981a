"""Mooncake's KV-cache-centric scheduling (Qin et al., FAST 2025), Algorithm 1. Pure.

    for each prefill instance: if best prefix / own prefix < threshold (it has enough by itself)
        TTFT = T_queue + T_prefill(prompt, own prefix)
    else
        TTFT = T_transfer(best - own) + T_queue + T_prefill(prompt, best prefix)     the prefix is fetched: replication

The lowest TTFT wins; decode is the instance with the least load. Algorithm 1 answers 429 when TTFT or TBT would miss
its SLO: here the queue decides that, and a policy only has requests wait.
"""

from collections.abc import Mapping, Sequence

from cluster.scheduler.candidate import Decision
from cluster.scheduler.policy import Choices, Memoryless
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair, uncached_tokens
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import decodes_with_room, make_decision, ready_prefills


class Mooncake(Memoryless):
    """Ties go to the lower id. `bytes_per_s` of links until they are measured."""

    def __init__(self, max_kv_usage: float, bytes_per_s: float, threshold: float = 2.0) -> None:
        self._max_kv_usage = max_kv_usage
        self._bytes_per_s = bytes_per_s
        self._threshold = threshold

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """See Policy."""
        cached, everyone = choices.cached, [*choices.prefills, *choices.decodes]
        if not choices.prefills or request.placement == "local":
            takers = decodes_with_room(request, choices.decodes, self._max_kv_usage, local=True)
            if not takers:
                return None
            _, decode, lender = self._best(request, takers, everyone, cached)
            return make_decision(request, None, decode, cached, "local_no_prefill", lender)
        decodes = decodes_with_room(request, choices.decodes, self._max_kv_usage, local=False)
        if not decodes:
            return None
        decode = min(decodes, key=lambda one: (one.num_decode_requests, -one.num_free_blocks))
        ready = [p for p in ready_prefills(request, choices.prefills) if can_pair(p.info, decode.info)]
        if not ready:
            return None
        _, prefill, lender = self._best(request, ready, everyone, cached)
        return make_decision(request, prefill, decode, cached, "pair", lender)

    def _best(
        self,
        request: Reserve,
        takers: Sequence[ReplicaView],
        everyone: Sequence[ReplicaView],
        cached: Mapping[str, int],
    ) -> tuple[float, ReplicaView, ReplicaView | None]:
        able = sorted(everyone, key=lambda replica: replica.info.replica_id)
        best = max(able, key=lambda replica: cached.get(replica.info.replica_id, 0))
        return min((self.ttft(request, taker, best, cached) for taker in takers), key=lambda found: found[0])

    def ttft(
        self, request: Reserve, taker: ReplicaView, best: ReplicaView, cached: Mapping[str, int]
    ) -> tuple[float, ReplicaView, ReplicaView | None]:
        """Seconds at a replica, and whom it fetches from."""
        own, most = (cached.get(replica.info.replica_id, 0) for replica in (taker, best))
        rate, queue_s = taker.prefill_tokens_per_s, taker.outstanding_prefill_tokens / taker.prefill_tokens_per_s
        fetches = most > own and (own == 0 or most / own >= self._threshold) and can_pair(best.info, taker.info)
        if not fetches:
            return queue_s + uncached_tokens(request, own, taker) / rate, taker, None
        layout = taker.info.layout
        num_bytes = (most - own) * layout.block_bytes
        transfer_s = num_bytes / (taker.bytes_per_s_from(best.info.replica_id) or self._bytes_per_s)
        return transfer_s + queue_s + uncached_tokens(request, most, taker) / rate, taker, best

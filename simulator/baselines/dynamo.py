"""NVIDIA Dynamo's KV router, and its conditional disaggregation. Pure.

    cost(worker) = scale * max(active prefill tokens + prompt tokens - credit * cached tokens, 0) / block size
                   + decode blocks of the worker with this request

The lowest cost wins; the stage that chooses who decodes has credit 0. A prompt is prefilled where it is decoded when
its effective input (what is not cached there) is below 2048 tokens and below 0.7 of the prompt.
Source: the router's and the disaggregated router's documentation of ai-dynamo/dynamo.
"""

from collections.abc import Mapping

from cluster.scheduler.candidate import Decision
from cluster.scheduler.policy import Choices, Memoryless
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair
from core.messages.to_scheduler import Reserve
from simulator.baselines.staged import decodes_with_room, make_decision, num_cached_tokens, ready_prefills

MOST_LOCAL_TOKENS = 2048
MOST_LOCAL_SHARE = 0.7


class Dynamo(Memoryless):
    """Ties go to the lower id."""

    def __init__(self, max_kv_usage: float, scale: float = 1.0, credit: float = 1.0) -> None:
        self._max_kv_usage = max_kv_usage
        self._scale = scale
        self._credit = credit

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """See Policy."""
        cached = choices.cached
        local = decodes_with_room(request, choices.decodes, self._max_kv_usage, local=True)
        if not choices.prefills or request.placement == "local":
            if not local:
                return None
            decode = min(local, key=lambda replica: self.cost(request, replica, cached, self._credit))
            return make_decision(request, None, decode, cached, "local_no_prefill")
        decodes = decodes_with_room(request, choices.decodes, self._max_kv_usage, local=False)
        if not decodes:
            return None
        decode = min(decodes, key=lambda replica: self.cost(request, replica, cached, 0.0))
        if decode in local and self._is_short(request, decode, cached):
            return make_decision(request, None, decode, cached, "local_short")
        ready = [p for p in ready_prefills(request, choices.prefills) if can_pair(p.info, decode.info)]
        if not ready:
            return None
        prefill = min(ready, key=lambda replica: self.cost(request, replica, cached, self._credit))
        return make_decision(request, prefill, decode, cached, "pair")

    def cost(self, request: Reserve, replica: ReplicaView, cached: Mapping[str, int], credit: float) -> float:
        """In blocks."""
        size = replica.info.layout.block_size
        overlap = credit * num_cached_tokens(request, replica, cached)
        prompt = max(replica.outstanding_prefill_tokens + request.num_tokens - overlap, 0.0)
        return self._scale * prompt / size + self._decode_blocks(request, replica)

    @staticmethod
    def _decode_blocks(request: Reserve, replica: ReplicaView) -> int:
        layout, num_held = replica.info.layout, replica.info.num_blocks - replica.num_free_blocks
        return num_held + layout.num_blocks_for(request.num_tokens)

    @staticmethod
    def _is_short(request: Reserve, decode: ReplicaView, cached: Mapping[str, int]) -> bool:
        effective = request.num_tokens - num_cached_tokens(request, decode, cached)
        return effective < MOST_LOCAL_TOKENS and effective / request.num_tokens < MOST_LOCAL_SHARE

"""Where one request runs: the (prefill, decode) pair, or decode alone, with the lowest predicted TTFT. Pure.

TTFT(P, D) = queue(P) + prefill(uncached on P) + transfer(bytes D lacks) not hidden by compute + wait(D)
TTFT(D)    = queue(D) + prefill(uncached on D), at D's own rate; slows D's running batch, so it is allowed only
             when the suffix is short, D is idle, or prefill is saturated or lost

Whoever prefills may first pull the prefix that another replica L has cached, if that is faster than computing it:
uncached shrinks to that on L, and pull(bytes that L has more, over the link) is added.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.scheduler.fleet_view import ReplicaView
from core.config import SchedulerConfig
from core.messages.fleet import ReplicaInfo
from core.messages.to_scheduler import Reserve
from core.version import PIPELINE_PROTOCOL

LINK_BYTES_PER_S = 1.5e9  # until links are measured
LINK_LATENCY_S = 0.002
HIDDEN_SHARE = 0.8  # of a transfer, by the compute of later layers and chunks
STEPS_HELD = 1  # beside one for each of its stages, a worker holds about so many steps; the rest waits at the scheduler


@dataclass(frozen=True)
class Decision:
    """The chosen replicas, and the terms that made them win, in seconds."""

    prefill: ReplicaView | None
    decode: ReplicaView
    reason: str
    queue_s: float
    prefill_s: float
    transfer_s: float
    num_uncached_tokens: int
    num_decode_blocks: int  # that the request will claim on decode for its prompt
    lender: ReplicaView | None = None  # whose cached prefix is pulled first
    pull_s: float = 0.0
    crosses_zones: bool = False  # taken only when no candidate within one zone has room

    @property
    def predicted_ttft_s(self) -> float:
        """Sum of the terms."""
        return self.queue_s + self.pull_s + self.prefill_s + self.transfer_s


@dataclass(frozen=True)
class _Pull:
    """What whoever prefills takes over from a lender, and what is left to compute."""

    lender: ReplicaView | None
    seconds: float
    num_uncached_tokens: int


class DecisionMaker:
    """One method; state is the caller's."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def decide(
        self,
        request: Reserve,
        prefills: Sequence[ReplicaView],
        decodes: Sequence[ReplicaView],
        cached: dict[str, int],
    ) -> Decision | None:
        """The cheapest candidate that has room now, or None: wait. `cached` are leading blocks by replica id.

        Ties go to the replicas with the fewest reservations, so that equal replicas fill evenly, then by id, so that
        a decision can be repeated.
        """
        everyone = [replica for replica in (*prefills, *decodes) if replica.info.replica_id not in request.avoid]
        prefills = _without(prefills, request.avoid)
        decodes = _without(decodes, request.avoid)
        with_room = [decode for decode in decodes if self._has_room(request, decode, num_at_once=1)]
        ready_prefills = [prefill for prefill in prefills if takes_more(prefill) and request.placement != "local"]
        candidates = []
        for decode in with_room:
            partners = [prefill for prefill in prefills if self._may_pair(request, prefill, decode)]
            ready = [prefill for prefill in partners if prefill in ready_prefills]
            candidates += [self._pair(request, prefill, decode, everyone, cached) for prefill in ready]
            reason = self._why_local(request, decode, cached, have_prefill=bool(partners), saturated=not ready)
            if reason and self._has_room(request, decode, decode.info.max_num_batched_tokens):
                candidates.append(self._local(request, decode, everyone, cached, reason))
        return min(candidates, key=_rank, default=None)

    def _has_room(self, request: Reserve, decode: ReplicaView, num_at_once: int) -> bool:
        # Cached blocks count, too: nobody may hold them yet, and taking them makes them no longer free.
        needed = decode.info.layout.num_blocks_held(request.num_tokens + 1, num_at_once)
        reserve = (1 - self._config.max_decode_kv_usage) * decode.info.num_blocks
        is_empty = decode.num_decode_requests == 0
        fits = decode.num_free_blocks - needed >= (0 if is_empty else reserve)
        return fits and decode.num_decode_requests < decode.info.max_num_seqs

    def _pair(
        self,
        request: Reserve,
        prefill: ReplicaView,
        decode: ReplicaView,
        everyone: Sequence[ReplicaView],
        cached: dict[str, int],
    ) -> Decision:
        pull = self._pull(request, prefill, everyone, cached)
        blocks = self._decode_blocks(request, decode, cached)
        layout = decode.info.layout
        num_bytes = blocks * layout.block_bytes
        bytes_per_s = decode.bytes_per_s_from(prefill.info.replica_id) or LINK_BYTES_PER_S
        return Decision(
            prefill,
            decode,
            "pair",
            queue_s=prefill.outstanding_prefill_tokens / prefill.prefill_tokens_per_s,
            prefill_s=pull.num_uncached_tokens / prefill.prefill_tokens_per_s,
            transfer_s=LINK_LATENCY_S + (1 - HIDDEN_SHARE) * num_bytes / bytes_per_s,
            num_uncached_tokens=pull.num_uncached_tokens,
            num_decode_blocks=blocks,
            lender=pull.lender,
            pull_s=pull.seconds,
            crosses_zones=self._config.zone_affinity != "ignore" and prefill.info.zone != decode.info.zone,
        )

    def _may_pair(self, request: Reserve, prefill: ReplicaView, decode: ReplicaView) -> bool:
        """The prompt fits on prefill, the two may exchange blocks, and the zones allow it."""
        near = self._config.zone_affinity != "require" or prefill.info.zone == decode.info.zone
        return near and request.num_tokens <= prefill.info.max_model_len and can_pair(prefill.info, decode.info)

    def _local(
        self,
        request: Reserve,
        decode: ReplicaView,
        everyone: Sequence[ReplicaView],
        cached: dict[str, int],
        reason: str,
    ) -> Decision:
        pull = self._pull(request, decode, everyone, cached)
        return Decision(
            None,
            decode,
            reason,
            queue_s=decode.outstanding_prefill_tokens / decode.prefill_tokens_per_s,
            prefill_s=pull.num_uncached_tokens / decode.prefill_tokens_per_s,
            transfer_s=0.0,
            num_uncached_tokens=pull.num_uncached_tokens,
            num_decode_blocks=self._decode_blocks(request, decode, cached),
            lender=pull.lender,
            pull_s=pull.seconds,
        )

    def _pull(
        self, request: Reserve, taker: ReplicaView, everyone: Sequence[ReplicaView], cached: dict[str, int]
    ) -> _Pull:
        """The lender with the deepest prefix, when fetching what it has more is faster than computing that."""
        held = cached.get(taker.info.replica_id, 0)
        alone = _Pull(None, 0.0, _uncached_tokens(request, held, taker))
        lenders = [lender for lender in everyone if can_pair(lender.info, taker.info)]
        lender = max(lenders, key=lambda one: cached.get(one.info.replica_id, 0), default=taker)
        depth, layout = cached.get(lender.info.replica_id, 0), taker.info.layout
        num_uncached = _uncached_tokens(request, depth, taker)
        num_saved = alone.num_uncached_tokens - num_uncached
        if num_saved < self._config.pull_min_tokens:
            return alone
        num_blocks = layout.num_blocks_missing(held, depth * layout.block_size)
        num_bytes = num_blocks * layout.block_bytes
        bytes_per_s = taker.bytes_per_s_from(lender.info.replica_id) or LINK_BYTES_PER_S
        pull_s = 2 * LINK_LATENCY_S + num_bytes / bytes_per_s
        return _Pull(lender, pull_s, num_uncached) if pull_s < num_saved / taker.prefill_tokens_per_s else alone

    def _why_local(
        self, request: Reserve, decode: ReplicaView, cached: dict[str, int], *, have_prefill: bool, saturated: bool
    ) -> str:
        if request.placement == "local":
            return "local_asked"
        if not have_prefill:
            return "local_no_prefill"
        if request.placement == "pair":
            return ""
        uncached = _uncached_tokens(request, cached.get(decode.info.replica_id, 0), decode)
        if uncached <= self._config.local_prefill_max_tokens:
            return "local_short"
        if saturated and decode.num_decode_requests == 0:
            return "local_idle"
        return ""

    @staticmethod
    def _decode_blocks(request: Reserve, decode: ReplicaView, cached: dict[str, int]) -> int:
        return decode.info.layout.num_blocks_missing(cached.get(decode.info.replica_id, 0), request.num_tokens)


def can_pair(prefill: ReplicaInfo, decode: ReplicaInfo) -> bool:
    """KV blocks of one mean the same to the other, which finds them, and both are of one generation."""
    means_the_same = prefill.compatibility == decode.compatibility and prefill.layout.groups == decode.layout.groups
    finds_stages = prefill.layout.pipeline_parallel == 1 or decode.protocol >= PIPELINE_PROTOCOL
    return means_the_same and finds_stages and prefill.generation == decode.generation


def takes_more(prefill: ReplicaView) -> bool:
    """Whether the replica holds less than about two steps of work, or as many more as it has more stages."""
    num_steps = prefill.info.layout.pipeline_parallel + STEPS_HELD
    return prefill.outstanding_prefill_tokens < num_steps * prefill.info.max_num_batched_tokens


def has_free_slot(decode: ReplicaView, max_kv_usage: float) -> bool:
    """Whether a request of hardly any tokens would find room."""
    is_below_watermark = decode.num_free_blocks > (1 - max_kv_usage) * decode.info.num_blocks
    return is_below_watermark and decode.num_decode_requests < decode.info.max_num_seqs


def _uncached_tokens(request: Reserve, num_blocks: int, replica: ReplicaView) -> int:
    return max(1, request.num_tokens - num_blocks * replica.info.layout.block_size)


def _without(replicas: Sequence[ReplicaView], avoid: Iterable[str]) -> list[ReplicaView]:
    """Leaves out the replicas that just failed the request, unless none would be left."""
    others = [replica for replica in replicas if replica.info.replica_id not in avoid]
    return others or list(replicas)


def _rank(decision: Decision) -> tuple[bool, float, int, str, str]:
    prefill, decode = decision.prefill, decision.decode
    reservations = decode.num_reservations + (prefill.num_reservations if prefill else 0)
    return (
        decision.crosses_zones,
        round(decision.predicted_ttft_s, 4),
        reservations,
        prefill.info.replica_id if prefill else "",
        decode.info.replica_id,
    )

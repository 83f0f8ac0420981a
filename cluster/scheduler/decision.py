"""Where one request runs: the (prefill, decode) pair, or decode alone, with the lowest predicted TTFT. Pure.

TTFT(P, D) = queue(P) + prefill(uncached on P) + transfer(bytes D lacks) not hidden by compute + wait(D)
TTFT(D)    = queue(D) + prefill(uncached on D), at D's own rate; slows D's running batch, so it is allowed only
             when the suffix is short, D is idle, or prefill is saturated or lost

Whoever prefills may first pull the prefix that another replica L has cached, if that is faster than computing it:
uncached shrinks to that on L, and pull(bytes that L has more, over the link) is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.scheduler.candidate import Candidate, Decision, Terms
from cluster.scheduler.fleet_view import ReplicaView
from cluster.scheduler.policy import Choices, Memoryless
from cluster.scheduler.rules import can_pair, fits_prefill, has_room, takes_more, uncached_tokens, without
from core.config import SchedulerConfig
from core.messages.to_scheduler import Reserve

LINK_BYTES_PER_S = 1.5e9  # until links are measured
LINK_LATENCY_S = 0.002
NUM_EXPLAINED = 8  # candidates that a decision keeps
HIDDEN_SHARE = 0.8  # of a transfer, by the compute of later layers and chunks


@dataclass(frozen=True)
class _Pull:
    """What whoever prefills takes over from a lender, and what is left to compute."""

    lender: ReplicaView | None
    seconds: float
    num_uncached_tokens: int


class DecisionMaker(Memoryless):
    """The production policy."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """The cheapest candidate that has room now, or None: wait.

        Ties go to the replicas with the fewest reservations, so that equal replicas fill evenly, then by id, so that
        a decision can be repeated.
        """
        everyone = [r for r in (*choices.prefills, *choices.decodes) if r.info.replica_id not in request.avoid]
        prefills, decodes = (without(pool, request.avoid) for pool in (choices.prefills, choices.decodes))
        cached = choices.cached
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
        ranked = sorted(candidates, key=_rank)
        return replace(ranked[0], candidates=tuple(map(_explained, ranked[:NUM_EXPLAINED]))) if ranked else None

    def _has_room(self, request: Reserve, decode: ReplicaView, num_at_once: int) -> bool:
        return has_room(request.num_tokens + 1, decode, num_at_once, self._config.max_decode_kv_usage)

    def _pair(
        self,
        request: Reserve,
        prefill: ReplicaView,
        decode: ReplicaView,
        everyone: Sequence[ReplicaView],
        cached: Mapping[str, int],
    ) -> Decision:
        pull = self._pull(request, prefill, everyone, cached)
        blocks = self._decode_blocks(request, decode, cached)
        layout = decode.info.layout
        num_bytes = blocks * layout.block_bytes_per_rank * layout.tensor_parallel
        bytes_per_s = decode.bytes_per_s_from(prefill.info.replica_id) or LINK_BYTES_PER_S
        return Decision(
            prefill,
            decode,
            "pair",
            Terms(
                queue_s=prefill.outstanding_prefill_tokens / prefill.prefill_tokens_per_s,
                pull_s=pull.seconds,
                prefill_s=pull.num_uncached_tokens / prefill.prefill_tokens_per_s,
                transfer_s=LINK_LATENCY_S + (1 - HIDDEN_SHARE) * num_bytes / bytes_per_s,
            ),
            num_uncached_tokens=pull.num_uncached_tokens,
            num_decode_blocks=blocks,
            lender=pull.lender,
            num_transfer_bytes=num_bytes,
            crosses_zones=self._config.zone_affinity != "ignore" and prefill.info.zone != decode.info.zone,
        )

    def _may_pair(self, request: Reserve, prefill: ReplicaView, decode: ReplicaView) -> bool:
        """The prompt fits on prefill, the two may exchange blocks, and the zones allow it."""
        near = self._config.zone_affinity != "require" or prefill.info.zone == decode.info.zone
        return near and fits_prefill(request, prefill.info) and can_pair(prefill.info, decode.info)

    def _local(
        self,
        request: Reserve,
        decode: ReplicaView,
        everyone: Sequence[ReplicaView],
        cached: Mapping[str, int],
        reason: str,
    ) -> Decision:
        pull = self._pull(request, decode, everyone, cached)
        return Decision(
            None,
            decode,
            reason,
            Terms(
                queue_s=decode.outstanding_prefill_tokens / decode.prefill_tokens_per_s,
                pull_s=pull.seconds,
                prefill_s=pull.num_uncached_tokens / decode.prefill_tokens_per_s,
            ),
            num_uncached_tokens=pull.num_uncached_tokens,
            num_decode_blocks=self._decode_blocks(request, decode, cached),
            lender=pull.lender,
        )

    def _pull(
        self, request: Reserve, taker: ReplicaView, everyone: Sequence[ReplicaView], cached: Mapping[str, int]
    ) -> _Pull:
        """The lender with the deepest prefix, when fetching what it has more is faster than computing that."""
        held = cached.get(taker.info.replica_id, 0)
        alone = _Pull(None, 0.0, uncached_tokens(request, held, taker))
        lenders = [lender for lender in everyone if can_pair(lender.info, taker.info)]
        lender = max(lenders, key=lambda one: cached.get(one.info.replica_id, 0), default=taker)
        depth, layout = cached.get(lender.info.replica_id, 0), taker.info.layout
        num_uncached = uncached_tokens(request, depth, taker)
        num_saved = alone.num_uncached_tokens - num_uncached
        if num_saved < self._config.pull_min_tokens:
            return alone
        num_blocks = layout.num_blocks_missing(held, depth * layout.block_size)
        num_bytes = num_blocks * layout.block_bytes_per_rank * layout.tensor_parallel
        bytes_per_s = taker.bytes_per_s_from(lender.info.replica_id) or LINK_BYTES_PER_S
        pull_s = 2 * LINK_LATENCY_S + num_bytes / bytes_per_s
        return _Pull(lender, pull_s, num_uncached) if pull_s < num_saved / taker.prefill_tokens_per_s else alone

    def _why_local(
        self, request: Reserve, decode: ReplicaView, cached: Mapping[str, int], *, have_prefill: bool, saturated: bool
    ) -> str:
        if request.placement == "local":
            return "local_asked"
        if not have_prefill:
            return "local_no_prefill"
        if request.placement == "pair":
            return ""
        uncached = uncached_tokens(request, cached.get(decode.info.replica_id, 0), decode)
        if uncached <= self._config.local_prefill_max_tokens:
            return "local_short"
        if saturated and decode.num_decode_requests == 0:
            return "local_idle"
        return ""

    @staticmethod
    def _decode_blocks(request: Reserve, decode: ReplicaView, cached: Mapping[str, int]) -> int:
        return decode.info.layout.num_blocks_missing(cached.get(decode.info.replica_id, 0), request.num_tokens)


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


def _explained(decision: Decision) -> Candidate:
    prefill, lender = decision.prefill, decision.lender
    return Candidate(
        prefill.info.replica_id if prefill else "",
        decision.decode.info.replica_id,
        lender.info.replica_id if lender else "",
        decision.reason,
        decision.terms,
    )

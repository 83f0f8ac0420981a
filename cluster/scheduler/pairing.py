"""Weighs pairs of a source and a sink, and local prefill, against each other. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from cluster.scheduler.candidate import Candidate, Decision, Terms
from cluster.scheduler.handoff_time import Handoff, left_s
from cluster.scheduler.learned import Learned
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair, fits_prefill
from cluster.scheduler.shortlist import May
from cluster.scheduler.sides import Ask, Sides, Sink, Source
from cluster.scheduler.step_costs import kv_bytes_per_token
from core.config import SchedulerConfig

NUM_EXPLAINED = 8  # candidates that a decision keeps
NUM_LOCAL = 4  # decode replicas that local prefill is weighed on

# What decides, in this order: crosses zones, ITL beyond the SLO in tenths of it, TTFT to 0.1 ms, reservations, ids.
Rank = tuple[bool, float, float, int, str, str]


class Weighed(NamedTuple):
    """A candidate."""

    rank: Rank
    reason: str
    source: Source
    sink: Sink
    transfer_s: float
    itl_s: float


class Pairing:
    """Costs that depend on both ends."""

    def __init__(self, config: SchedulerConfig, learned: Learned, sides: Sides, *, exhaustive: bool = False) -> None:
        self._config = config
        self._learned = learned
        self._sides = sides
        self._exhaustive = exhaustive

    def pairs(self, sources: Sequence[Source], sinks: Sequence[Sink]) -> list[Weighed]:
        """Those that may be and that no other one is sure to beat.

        Sources and sinks come in the order of what they cost by themselves: from the pair on whose sum exceeds the best
        total so far, no later one can win.
        """
        zones, require_near = self._config.zone_affinity != "ignore", self._config.zone_affinity == "require"
        floor_s = self._learned.links.least_latency_s
        ordered = sorted(sources, key=lambda s: (round(s.first_token_s, 4), s.view.num_reservations))
        weighed: list[Weighed] = []
        best: tuple[bool, float, float] | None = None
        for sink in sorted(sinks, key=lambda s: (self._excess(s.itl_s), round(s.wait_s, 4), s.view.num_reservations)):
            excess, decode = self._excess(sink.itl_s), sink.view
            least_s = sink.wait_s + (floor_s if sink.num_bytes else 0.0)
            for source in ordered:
                prefill = source.view
                crosses = zones and prefill.info.zone != decode.info.zone
                bound = crosses, excess, round(source.first_token_s + least_s, 4)
                if best is not None and bound > best and not self._exhaustive:
                    continue
                if (crosses and require_near) or not can_pair(prefill.info, decode.info):
                    continue
                transfer_s = self._transfer_s(source, sink)
                ttft_s = round(source.first_token_s + transfer_s + sink.wait_s, 4)
                num_reservations = prefill.num_reservations + decode.num_reservations
                rank = (crosses, excess, ttft_s, num_reservations, prefill.info.replica_id, decode.info.replica_id)
                weighed.append(Weighed(rank, "pair", source, sink, transfer_s, sink.itl_s))
                if best is None or rank[:3] < best:
                    best = rank[:3]
        return weighed

    def locals(
        self, ask: Ask, sinks: Sequence[Sink], prefills: Sequence[ReplicaView], has_room: May, *, have_pairs: bool
    ) -> list[Weighed]:
        """Local prefill where it may be; `has_room` for all that a prompt needs while it is computed."""
        if ask.request.placement == "pair" and have_pairs:
            return []
        few = sinks
        if len(sinks) > NUM_LOCAL and not self._exhaustive:
            few = sorted(sinks, key=lambda s: (-s.depth, s.wait_s))[: NUM_LOCAL // 2]
            few += sorted(sinks, key=lambda s: (s.wait_s, -s.depth))[: NUM_LOCAL // 2]
        weighed = {}
        for sink in few:
            view = sink.view
            source = self._sides.source(ask, view)
            source = source._replace(prefill_s=source.prefill_s + self._sides.beside_s(view, source))
            harm_s = self._sides.chunk_step_s(ask, view, source) if view.num_decode_requests else 0.0
            reason = self._why_local(ask, source, prefills, harm_s, have_pairs=have_pairs)
            if not reason or not has_room(view):
                continue
            itl_s = max(sink.itl_s, harm_s)
            ttft_s = round(source.queue_s + source.pull_s + source.restore_s + source.prefill_s, 4)
            rank = (False, self._excess(itl_s), ttft_s, view.num_reservations, "", view.info.replica_id)
            weighed[rank[-1]] = Weighed(rank, reason, source, sink, 0.0, itl_s)
        return list(weighed.values())

    def best(self, ask: Ask, weighed: Sequence[Weighed]) -> Decision | None:
        """The first by rank, with the next ones beside it."""
        if not weighed:
            return None
        ranked = sorted(weighed, key=lambda one: one.rank)[:NUM_EXPLAINED]
        reason, source, sink = ranked[0][1:4]
        return Decision(
            source.view if reason == "pair" else None,
            sink.view,
            reason,
            _terms(ranked[0]),
            source.num_uncached,
            sink.num_blocks,
            ask.num_new,
            source.lender,
            ranked[0].rank[0],
            sink.num_bytes if reason == "pair" else 0,
            ask.request.num_tokens - source.num_uncached,
            tuple(map(_explained, ranked)),
        )

    def _transfer_s(self, source: Source, sink: Sink) -> float:
        if not sink.num_bytes:
            return 0.0
        prefill, decode = source.view, sink.view
        info = prefill.info
        latency_s, byte_s = self._learned.links.cost(prefill, decode)
        num_chunks = -(-source.num_uncached // info.max_num_batched_tokens)
        last_bytes = (
            min(source.num_uncached, info.max_num_batched_tokens)
            * kv_bytes_per_token(decode.info.layout)
            / decode.info.layout.num_layers
        )
        first_s = source.prefill_s / (num_chunks * decode.info.layout.num_layers)
        backlog = self._learned.flights.before(info.replica_id, decode.info.replica_id)
        waits_s = source.first_token_s - source.prefill_s
        handoff = Handoff(sink.num_bytes, last_bytes, backlog, waits_s, source.prefill_s, first_s)
        return left_s(handoff, latency_s, byte_s)

    def _why_local(
        self, ask: Ask, source: Source, prefills: Sequence[ReplicaView], harm_s: float, *, have_pairs: bool
    ) -> str:
        """Empty when it may not be."""
        limit, is_idle = self._config.local_prefill_max_tokens, source.view.num_decode_requests == 0
        if ask.request.placement == "local":
            return "local_asked"
        if not have_pairs and not any(self._may_pair(ask, prefill, source.view) for prefill in prefills):
            return "local_no_prefill"
        if ask.request.placement == "pair":
            return ""
        if limit is not None:
            if source.num_uncached <= limit:
                return "local_short"
            return "local_idle" if is_idle and not have_pairs else ""
        if not is_idle and harm_s > self._config.itl_slo_s:
            return ""
        if have_pairs:
            return "local_faster"
        return "local_idle" if is_idle else "local_saturated"

    def _may_pair(self, ask: Ask, prefill: ReplicaView, decode: ReplicaView) -> bool:
        """The prompt fits on prefill, the two may exchange blocks, and the zones allow it."""
        near = self._config.zone_affinity != "require" or prefill.info.zone == decode.info.zone
        return near and fits_prefill(ask.request, prefill.info) and can_pair(prefill.info, decode.info)

    def _excess(self, itl_s: float) -> float:
        return round(max(0.0, itl_s / self._config.itl_slo_s - 1), 1)


def _terms(one: Weighed) -> Terms:
    source, wait_s = one.source, one.sink.wait_s if one.reason == "pair" else 0.0
    return Terms(source.queue_s, source.pull_s, source.restore_s, source.prefill_s, one.transfer_s, wait_s, one.itl_s)


def _explained(one: Weighed) -> Candidate:
    lender = one.source.lender
    return Candidate(one.rank[4], one.rank[5], lender.info.replica_id if lender else "", one.reason, _terms(one))

"""Where one request runs: the pair (prefill P, decode D), or decode alone, at the lowest cost. Pure.

TTFT(P, D) = queue(P) + pull + restore + prefill(uncached, context on P)
             + what of transfer(bytes that D lacks, over the link P -> D, behind the bytes in flight) is not hidden
             + wait(D)
TTFT(D)    = queue(D) + pull + restore + prefill(uncached, context on D, beside its batch)

cost       = TTFT + evict (what others will compute again, whose cached blocks it takes the place of)
                  + work (a part of prefill: others wait for it)
                  + strain (what the ITL of D's batch with the request in it counts for, near its SLO and beyond)

subject to the room that D has through the request's expected length, and to the ITL of D's batch with the request in
it: beyond the SLO all in it would be late, in the line only those who wait. Who is in the middle of an answer joins
all the same. Where nobody else prefills, a prompt waits for a plan while every D has a full step's worth to compute:
what is given out early goes by forecasts, and keeps its place whatever becomes more urgent.
A prompt that is under way somewhere counts as cached behind its queue there.
Pull: whoever prefills takes over what a third replica has cached, if that is faster than computing it.
Reasons: pair; of local prefill
    local_asked, local_no_prefill: nothing else is possible
    local_short: at most `local_prefill_max_tokens` are uncached
    local_faster: it is predicted faster than any pair, and the steps of the batch stay within the ITL SLO
    local_idle, local_saturated: prefill takes no more work; D has no batch, or one that it keeps within the SLO
"""

from collections.abc import Sequence
from operator import attrgetter

from cluster.scheduler.candidate import Decision
from cluster.scheduler.coming_prefixes import ComingPrefixes
from cluster.scheduler.learned import Learned
from cluster.scheduler.pace import Pace
from cluster.scheduler.policy import Choices
from cluster.scheduler.prefix_care import Copy, PrefixCare
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservation
from cluster.scheduler.rules import usable_hashes
from cluster.scheduler.weighed import Explained, Weighed
from cluster.scheduler.weighing import Weighing
from core.config import SchedulerConfig
from core.messages.to_scheduler import Foresight, Report, Reserve

NUM_EXPLAINED = 8  # candidates that a decision keeps


class DecisionMaker:
    """The production policy."""

    def __init__(self, config: SchedulerConfig, *, exhaustive: bool = False) -> None:
        """`exhaustive` weighs all replicas against each other: what short lists lose is measured against it."""
        self.learned = Learned()
        self._weighing = Weighing(config, self.learned, exhaustive=exhaustive)
        self._sites = self._weighing.sites
        self._coming = ComingPrefixes()
        self._care = PrefixCare(config.pull_min_tokens)
        self._decided: tuple[Reserve, Choices] | None = None  # the last question that had an answer

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """The cheapest candidate that has room now, or None: wait.

        Ties go to the replicas with the fewest reservations, so that equal replicas fill evenly, then by id, so that
        a decision can be repeated.
        """
        info = choices.decodes[0].info
        num_new = self.learned.lengths.of(info.generation, request.tenant, request.max_new_tokens)
        coming = self._coming.depths(usable_hashes(request, info.compatibility.block_size))
        best = _best(request, self._weighing.ways(request, choices, coming, num_new), num_new)
        self._decided = (request, choices) if best is not None else None
        return best

    # ---- what it is told ----------------------------------------------------------------------------------------

    def reported(self, replica: ReplicaView, report: Report, now: float) -> None:
        """Learns from samples; the replica's load has changed."""
        self.learned.reported(replica, report)
        self._coming.reported(replica.info.replica_id)
        known = self._sites.known(replica)
        num_before = known.num_queued if known is not None else 0
        site = self._sites.refresh(replica)
        if not num_before or site.num_queued < num_before:
            site.begun_at = now
        self._weighing.changed(site, now)

    def lost(self, replica_id: str) -> None:
        """Forgets the replica."""
        self.learned.lost(replica_id)
        self._coming.lost(replica_id)
        self._weighing.lost(replica_id)

    def booked(self, reservation: Reservation, now: float) -> None:
        """The loads of its replicas have changed."""
        self.learned.booked(reservation)
        self._take_care(reservation, now)
        decision = reservation.decision
        taker = decision.prefill or decision.decode
        layout = taker.info.layout
        if layout.reaches == (None,):  # others let go of what is behind their windows
            depth = decision.num_cached_tokens // layout.block_size
            hashes = reservation.request.block_hashes
            self._coming.begin(reservation.request_id, taker.info.replica_id, hashes, depth)
        if (site := self._sites.known(taker)) is not None:
            site.begun_at = max(site.begun_at, now - site.queue_s)  # of what was before it at most that is over
        self._replicas_changed(reservation, now)

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """Its prefill is over."""
        self.learned.first_token(reservation, num_cached_tokens, now)
        self._coming.computed(reservation.request_id)
        decision = reservation.decision
        view = decision.prefill or decision.decode
        site = self._sites.known(view)
        if site is not None:
            site.begun_at = now
            if decision.prefill is None and view.num_decode_requests > len(view.prefill_tokens) + 1:
                # others decode there
                site.stalls.add(decision.terms.prefill_s, site.num_steps(decision.num_uncached_tokens), now)
        self._replicas_changed(reservation, now)

    def finished(self, reservation: Reservation, now: float) -> None:
        """Its replicas are free of it."""
        self.learned.finished(reservation)
        if reservation.decoding_since is None:
            self._coming.end(reservation.request_id)
        self._replicas_changed(reservation, now)

    def foresight(self) -> Foresight:
        """How predictions compare with what came."""
        return self.learned.foresight()

    def pace(self, prefills: Sequence[ReplicaView], decodes: Sequence[ReplicaView], now: float) -> Pace:
        """See Policy."""
        return Pace.of([self._sites.of(view) for view in prefills or decodes], now, are_decodes=not prefills)

    def keeps_itl(self, num_tokens: int, decode: ReplicaView, now: float) -> bool:
        """See Policy."""
        return self._weighing.keeps_itl(num_tokens, decode, now)

    def take_held_until(self) -> float:
        """See Policy."""
        return self._weighing.take_held_until()

    def take_copies(self) -> list[Copy]:
        """See PrefixCare."""
        return self._care.take_copies()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _take_care(self, reservation: Reservation, now: float) -> None:
        decided, self._decided = self._decided, None
        if decided is None or decided[0] is not reservation.request:
            return
        request, choices = decided
        if not choices.cached.segments:
            return
        deep, prefill_s = choices.cached.segments[0], reservation.decision.terms.prefill_s
        depth = deep.depth
        num_tokens = depth * reservation.decision.decode.info.layout.block_size
        if self._care.used(request.block_hashes[depth - 1], num_tokens, prefill_s, now):
            pool = choices.decodes if reservation.prefill_id is None else choices.prefills
            have = {*choices.cached.names(deep)}
            holders = [view for view in choices.everyone.values() if view.usable and view.info.replica_id in have]
            others = [view for view in pool if view.usable and view.info.replica_id not in have]
            self._care.held(request.block_hashes[:depth], holders, others, now)

    def _replicas_changed(self, reservation: Reservation, now: float) -> None:
        for view in (reservation.decision.decode, reservation.decision.prefill):
            if view is not None and self._sites.known(view) is not None:
                self._weighing.changed(self._sites.refresh(view), now)


def _best(request: Reserve, weighed: Sequence[Weighed], num_new: float) -> Decision | None:
    """The first by rank, with the next ones beside it."""
    if not weighed:
        return None
    ranked = sorted(weighed, key=attrgetter("place"))[:NUM_EXPLAINED]
    first = ranked[0]
    source, sink, terms, is_pair = first.source, first.sink, first.terms, first.reason == "pair"
    return Decision(
        source.site.view if is_pair else None,
        sink.site.view,
        first.reason,
        terms,
        source.num_uncached,
        sink.num_blocks,
        num_new,
        source.lender.view if source.lender is not None else None,
        first.crosses_zones,
        sink.num_bytes if is_pair else 0,
        request.num_tokens - source.num_uncached,
        source.num_indexed,
        Explained(ranked),
    )

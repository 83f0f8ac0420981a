"""Where one request runs: the pair (prefill P, decode D), or decode alone, with the lowest predicted TTFT. Pure.

TTFT(P, D) = queue(P) + pull + restore + prefill(uncached, context on P)
             + what of transfer(bytes that D lacks, over the link P -> D, behind the bytes in flight) is not hidden
             + wait(D)
TTFT(D)    = queue(D) + pull + restore + prefill(uncached, context on D, beside its batch)

subject to the ITL of D's batch with the request in it, and to the room that D has through the request's expected
length. Pull: whoever prefills takes over what a third replica has cached, if that is faster than computing it.
Reasons: pair; of local prefill
    local_asked, local_no_prefill: nothing else is possible
    local_short: at most `local_prefill_max_tokens` are uncached
    local_faster: it is predicted faster than any pair, and the steps of the batch stay within the ITL SLO
    local_idle, local_saturated: prefill takes no more work; D has no batch, or one that it keeps within the SLO
"""

from collections.abc import Hashable, Sequence
from math import log

from cluster.scheduler.candidate import Decision
from cluster.scheduler.headroom import Headroom
from cluster.scheduler.learned import Learned
from cluster.scheduler.matches import Matches
from cluster.scheduler.pairing import Pairing
from cluster.scheduler.policy import Choices
from cluster.scheduler.ranked import Ranked
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservation
from cluster.scheduler.rules import fits_prefill, takes_more, without
from cluster.scheduler.shortlist import May, Shortlist
from cluster.scheduler.sides import Ask, Sides
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Foresight, Report, Reserve

NUM_LENDERS = 3  # with the deepest prefixes, that pulls are weighed from
SPEED_STEP = 0.05  # of the logarithm of a replica's pace: within it the load alone ranks replicas


class DecisionMaker:
    """The production policy."""

    def __init__(self, config: SchedulerConfig, *, exhaustive: bool = False) -> None:
        """`exhaustive` weighs all replicas against each other: what short lists lose is measured against it."""
        self.learned = Learned()
        self._exhaustive = exhaustive
        self._sides = Sides(self.learned.costs, self.learned.links, config.pull_min_tokens)
        self._pairing = Pairing(config, self.learned, self._sides, exhaustive=exhaustive)
        self._headroom = Headroom(config.max_decode_kv_usage)
        self._batch_headroom = Headroom(min(config.max_batch_kv_usage, config.max_decode_kv_usage))
        self._shortlists: dict[tuple[Role, str], Shortlist] = {}

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """The cheapest candidate that has room now, or None: wait.

        Ties go to the replicas with the fewest reservations, so that equal replicas fill evenly, then by id, so that
        a decision can be repeated.
        """
        generation, matches, now = choices.decodes[0].info.generation, choices.cached, choices.now
        num_new = self.learned.lengths.of(generation, request.tenant, request.max_new_tokens)
        ask = Ask(request, matches, self._lenders(request, choices), num_new)
        prefills, decodes = (without(pool, request.avoid) for pool in (choices.prefills, choices.decodes))

        headroom = self._batch_headroom if request.is_batch else self._headroom

        def has_room(view: ReplicaView) -> bool:
            itl_s = self.learned.costs.of(view).step_s
            return headroom.fits(request.num_tokens, num_new, view, 1, itl_s, now)

        def has_room_at_once(view: ReplicaView) -> bool:
            itl_s, num_at_once = self.learned.costs.of(view).step_s, view.info.max_num_batched_tokens
            return headroom.fits(request.num_tokens, num_new, view, num_at_once, itl_s, now)

        def may_prefill(view: ReplicaView) -> bool:
            return takes_more(view, is_batch=request.is_batch) and fits_prefill(request, view.info)

        sinks = [self._sides.sink(ask, view) for view in self._short(decodes, request, matches, has_room)]
        if not sinks:
            return None
        ready = self._short(prefills, request, matches, may_prefill) if request.placement != "local" else []
        sources = [self._sides.source(ask, view) for view in ready]
        weighed = self._pairing.pairs(sources, sinks)
        weighed += self._pairing.locals(ask, sinks, prefills, has_room_at_once, have_pairs=bool(weighed))
        return self._pairing.best(ask, weighed)

    # ---- what it is told ----------------------------------------------------------------------------------------

    def reported(self, replica: ReplicaView, report: Report, now: float) -> None:  # noqa: ARG002
        """Learns from samples; the replica's load has changed."""
        self.learned.reported(replica, report)
        self._changed(replica)

    def lost(self, replica_id: str) -> None:
        """Forgets the replica."""
        self.learned.lost(replica_id)
        for shortlist in self._shortlists.values():
            shortlist.ranked.remove(replica_id)

    def booked(self, reservation: Reservation, now: float) -> None:  # noqa: ARG002
        """The loads of its replicas have changed."""
        self.learned.booked(reservation)
        self._replicas_changed(reservation)

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """Its prefill is over."""
        self.learned.first_token(reservation, num_cached_tokens, now)
        self._replicas_changed(reservation)

    def finished(self, reservation: Reservation, now: float) -> None:  # noqa: ARG002
        """Its replicas are free of it."""
        self.learned.finished(reservation)
        self._replicas_changed(reservation)

    def foresight(self) -> Foresight:
        """How predictions compare with what came."""
        return self.learned.foresight()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _short(
        self, pool: Sequence[ReplicaView], request: Reserve, matches: Matches, may: May
    ) -> Sequence[ReplicaView]:
        """The pool is without those that the request avoids, unless only such are left."""
        if not pool:
            return ()
        if not request.avoid:
            return self._shortlist(pool[0]).of(pool, matches, may)
        return [view for view in pool if may(view)]  # rare: a short list knows of nobody's failures

    def _lenders(self, request: Reserve, choices: Choices) -> tuple[ReplicaView, ...]:
        found: list[ReplicaView] = []
        for segment in choices.cached.segments:
            for replica_id in choices.cached.names(segment):
                view = choices.everyone.get(replica_id)
                if view is not None and view.usable and replica_id not in request.avoid:
                    found.append(view)
                    if len(found) == NUM_LENDERS:
                        return tuple(found)
        return tuple(found)

    def _replicas_changed(self, reservation: Reservation) -> None:
        decision = reservation.decision
        self._changed(decision.decode)
        if decision.prefill is not None:
            self._changed(decision.prefill)

    def _changed(self, view: ReplicaView) -> None:
        self._shortlist(view).ranked.update(view)

    def _shortlist(self, view: ReplicaView) -> Shortlist:
        key = view.info.role, view.info.generation
        shortlist = self._shortlists.get(key)
        if shortlist is None:
            load_s = self._sides.queue_s if view.info.role is Role.PREFILL else self._decode_load_s
            ranked = Ranked(self._bucket, load_s)
            shortlist = self._shortlists[key] = Shortlist(ranked, exhaustive=self._exhaustive)
        return shortlist

    def _decode_load_s(self, view: ReplicaView) -> float:
        return self._sides.itl_s(view, 0, 0.0)

    def _bucket(self, view: ReplicaView) -> Hashable:
        costs, info = self.learned.costs.of(view), view.info
        pace_s = costs.token_s if info.role is Role.PREFILL else costs.step_s
        return info.zone, info.compatibility, info.layout.groups, round(log(max(pace_s, 1e-9)) / SPEED_STEP)

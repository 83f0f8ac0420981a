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

from collections.abc import Mapping, Sequence
from math import inf
from operator import attrgetter

from cluster.scheduler.candidate import Decision
from cluster.scheduler.coming_prefixes import ComingPrefixes
from cluster.scheduler.headroom import Headroom
from cluster.scheduler.learned import Learned
from cluster.scheduler.local_prefill import LocalRules, few_for_local, weigh_local
from cluster.scheduler.pace import Pace
from cluster.scheduler.pairing import Pairing
from cluster.scheduler.policy import Choices
from cluster.scheduler.prefix_care import Copy, PrefixCare
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservation
from cluster.scheduler.rules import can_pair, fits_prefill, takes_more, usable_hashes, without
from cluster.scheduler.shortlist import May, Shortlist
from cluster.scheduler.site import Site, Sites
from cluster.scheduler.source import Source, Sources
from cluster.scheduler.strain import MOST_OF_SLO, Strain
from cluster.scheduler.weighed import Explained, Sink, Weighed, rank_of
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Foresight, Report, Reserve
from core.slo_config import SloConfig

NUM_LENDERS = 2  # with the deepest prefixes, that pulls are weighed from
NUM_EXPLAINED = 8  # candidates that a decision keeps


class DecisionMaker:
    """The production policy."""

    def __init__(self, config: SchedulerConfig, *, exhaustive: bool = False) -> None:
        """`exhaustive` weighs all replicas against each other: what short lists lose is measured against it."""
        self.learned = Learned()
        self._config = config
        self._exhaustive = exhaustive
        self._sites = Sites(self.learned.costs, config.max_decode_kv_usage)
        self._headroom = Headroom()
        self._standard_ttft_s = config.slo.standard.ttft_s
        self._itl_slo_s = config.itl_slo_s
        self._most_itl_s = MOST_OF_SLO * config.itl_slo_s
        self._slo_itl_s = {name: config.slo.target(name).itl_s for name in SloConfig.model_fields}
        self._usual_strain = Strain(self._standard_ttft_s, min(config.itl_slo_s, config.slo.standard.itl_s))
        self._batch_itl_s = min(config.itl_slo_s, config.slo.interactive.itl_s)  # batch work slows nobody beyond this
        self._batch_headroom = Headroom(max(0.0, config.max_decode_kv_usage - config.max_batch_kv_usage))
        self._pairing = Pairing(self.learned.links, self.learned.flights, config.zone_affinity, exhaustive=exhaustive)
        self._local_rules = LocalRules(config.local_prefill_max_tokens, config.itl_slo_s)
        self._coming = ComingPrefixes()
        self._care = PrefixCare(config.pull_min_tokens)
        self._decided: tuple[Reserve, Choices] | None = None  # the last question that had an answer
        self._shortlists: dict[tuple[Role, str], Shortlist] = {}
        self._held_until = inf

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """The cheapest candidate that has room now, or None: wait.

        Ties go to the replicas with the fewest reservations, so that equal replicas fill evenly, then by id, so that
        a decision can be repeated.
        """
        generation, matches = choices.decodes[0].info.generation, choices.cached
        num_new = self.learned.lengths.of(generation, request.tenant, request.max_new_tokens)
        strain = self._strain(request)
        coming = self._coming.depths(usable_hashes(request, choices.decodes[0].info.compatibility.block_size))
        sinks = self._sinks(request, choices, coming, num_new, strain)
        if not sinks:
            return None
        lenders, links = self._lenders(request, choices), self.learned.links
        least, now = self._config.pull_min_tokens, choices.now
        sources = Sources(links, request.num_tokens, matches, lenders, least, now, coming)
        weighed: list[Weighed] = []
        if request.placement != "local" and choices.prefills:
            weighed = self._pairing.pairs(self._sources(request, choices, coming, sources), sinks)
        elif not choices.prefills and (held_until := min(sink.site.has_work_until for sink in sinks)) > now:
            self._held_until = min(self._held_until, held_until)
            return None
        if request.placement != "pair" or not weighed:
            weighed += self._locals(request, choices, sources, sinks, num_new, strain, have_pairs=bool(weighed))
        best = _best(request, weighed, num_new)
        self._decided = (request, choices) if best is not None else None
        return best

    # ---- what it is told ----------------------------------------------------------------------------------------

    def reported(self, replica: ReplicaView, report: Report, now: float) -> None:
        """Learns from samples; the replica's load has changed."""
        self.learned.reported(replica, report)
        self._coming.reported(replica.info.replica_id)
        num_before = self._sites.of(replica).num_queued
        site = self._sites.refresh(replica)
        if site.num_queued < num_before:
            site.begun_at = now
        self._changed(site, now)

    def lost(self, replica_id: str) -> None:
        """Forgets the replica."""
        self.learned.lost(replica_id)
        self._coming.lost(replica_id)
        for shortlist in self._shortlists.values():
            shortlist.remove(replica_id)
        self._sites.remove(replica_id)

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
        if len(taker.prefill_tokens) == 1 and (site := self._sites.known(taker)) is not None:
            site.begun_at = now
        self._replicas_changed(reservation, now)

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """Its prefill is over."""
        self.learned.first_token(reservation, num_cached_tokens, now)
        self._coming.computed(reservation.request_id)
        decision = reservation.decision
        view = decision.prefill or decision.decode
        site = self._sites.known(view)
        if site is not None:
            site.computed(decision.terms.prefill_s, now)
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
        return self._sites.of(decode).keeps_itl(self._most_itl_s, num_tokens, now)

    def take_held_until(self) -> float:
        """See Policy."""
        taken, self._held_until = self._held_until, inf
        return taken

    def take_copies(self) -> list[Copy]:
        """See PrefixCare."""
        return self._care.take_copies()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _sources(self, request: Reserve, choices: Choices, coming: Mapping[str, int], sources: Sources) -> list[Source]:
        def may_prefill(site: Site) -> bool:
            takes = takes_more(site.view, is_batch=True) if request.is_batch else site.takes_more
            return takes and site.view.usable and request.num_tokens <= site.info.max_model_len

        sites = self._short(choices.prefills, request, choices, coming, may_prefill)
        return [sources.of(site) for site in sites]

    def _sinks(
        self, request: Reserve, choices: Choices, coming: Mapping[str, int], num_new: float, strain: Strain
    ) -> list[Sink]:
        num_tokens, matches = request.num_tokens, choices.cached
        fits, now, kept_id = self._headroom_for(request).fits, choices.now, choices.kept_id
        most_itl_s = inf if request.num_shown else self._most_itl_s
        num_held = num_tokens + num_new / 2  # on average

        def has_room(site: Site) -> bool:
            may = site.has_slot and site.view.usable and site.replica_id != kept_id
            return may and fits(site, num_tokens, num_new, 1, now) and site.keeps_itl(most_itl_s, num_held, now)

        sinks = []
        for site in self._short(choices.decodes, request, choices, coming, has_room):
            depth = max(matches.depth(site.replica_id), coming.get(site.replica_id, 0))
            num_blocks = site.num_missing(depth, num_tokens)
            step_s = site.step_s + site.costs.context_s * num_held
            itl_s = site.itl_s(step_s, now)
            if request.is_batch and site.busy and itl_s > self._batch_itl_s:
                continue
            num_bytes = num_blocks * site.block_bytes
            strain_s = strain.seconds(itl_s)
            sinks.append(Sink(site, depth, num_blocks, num_bytes, site.left_of_step_s, step_s, itl_s, strain_s))
        return sinks

    def _locals(
        self,
        request: Reserve,
        choices: Choices,
        sources: Sources,
        sinks: Sequence[Sink],
        num_new: float,
        strain: Strain,
        *,
        have_pairs: bool,
    ) -> list[Weighed]:
        def may_pair(site: Site) -> bool:
            near = self._config.zone_affinity != "require"
            return any(
                (near or view.info.zone == site.zone)
                and fits_prefill(request, view.info)
                and can_pair(view.info, site.info)
                for view in without(choices.prefills, request.avoid)
            )

        headroom, weighed, now = self._headroom_for(request), [], choices.now
        for sink in sinks if self._exhaustive else few_for_local(sinks, request.num_tokens, strain, now):
            site = sink.site
            source, harm_s = weigh_local(sources, sink, request.num_tokens)
            if request.is_batch and site.busy and harm_s > self._batch_itl_s:
                continue
            reason = self._local_rules.why(request.placement, source, harm_s, have_pairs=have_pairs, may_pair=may_pair)
            # what is behind windows while a long chunk is computed takes room, too
            if reason and (
                site.whole_blocks or headroom.fits(site, request.num_tokens, num_new, site.max_at_once, now)
            ):
                itl_s = site.itl_s(sink.step_s, now, source.prefill_s, source.num_steps)
                strain_s = strain.seconds(itl_s)
                rank = rank_of(source.first_token_s + source.evict_s + source.work_s + strain_s, site.num_reserved)
                weighed.append(Weighed(rank, reason, source, sink, 0.0, itl_s, strain_s))
        return weighed

    def _headroom_for(self, request: Reserve) -> Headroom:
        return self._batch_headroom if request.is_batch else self._headroom

    def _strain(self, request: Reserve) -> Strain:
        """What a request asks for binds the batch that it joins; it loosens nothing for the others there."""
        slo_itl_s = request.itl_slo_s or self._slo_itl_s.get(request.slo_class, self._slo_itl_s["standard"])
        return Strain(self._standard_ttft_s, min(self._itl_slo_s, slo_itl_s))

    def _short(
        self,
        pool: Sequence[ReplicaView],
        request: Reserve,
        choices: Choices,
        coming: Mapping[str, int],
        may: May,
    ) -> list[Site]:
        if not request.avoid:
            is_only = not choices.prefills
            shortlist = self._shortlist(pool[0])
            short = shortlist.of(pool, request.num_tokens, choices.cached, may, choices.now, is_only=is_only)
            if coming and len(short) < len(pool):
                role, generation = pool[0].info.role, pool[0].info.generation
                found = {site.replica_id for site in short}
                for replica_id in coming:
                    site = self._sites.find(replica_id) if replica_id not in found else None
                    if site and (site.info.role, site.info.generation) == (role, generation) and may(site):
                        short.append(site)
            return short
        # rare: a short list knows of nobody's failures
        return [site for site in map(self._sites.of, without(pool, request.avoid)) if may(site)]

    def _lenders(self, request: Reserve, choices: Choices) -> tuple[Site, ...]:
        found: list[Site] = []
        for segment in choices.cached.segments:
            for replica_id in choices.cached.names(segment):
                view = choices.everyone.get(replica_id)
                if view is not None and view.usable and replica_id not in request.avoid:
                    found.append(self._sites.of(view))
                    if len(found) == NUM_LENDERS:
                        return tuple(found)
        return tuple(found)

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
                self._changed(self._sites.refresh(view), now)

    def _changed(self, site: Site, now: float) -> None:
        site.strain_s = self._usual_strain.seconds(site.itl_s(site.step_s, now))
        self._shortlist(site.view).changed(site)

    def _shortlist(self, view: ReplicaView) -> Shortlist:
        key = view.info.role, view.info.generation
        shortlist = self._shortlists.get(key)
        if shortlist is None:
            shortlist = self._shortlists[key] = Shortlist(self._sites, exhaustive=self._exhaustive)
        return shortlist


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

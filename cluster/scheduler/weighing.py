"""All ways that one request can go now, weighed: pairs, and decode replicas that prefill by themselves. Pure."""

from collections.abc import Mapping, Sequence
from math import inf

from cluster.scheduler.headroom import Headroom
from cluster.scheduler.learned import Learned
from cluster.scheduler.local_prefill import LocalRules, few_for_local, weigh_local
from cluster.scheduler.pairing import Pairing
from cluster.scheduler.policy import Choices
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair, fits_prefill, takes_more, without
from cluster.scheduler.shortlist import Shortlists
from cluster.scheduler.site import Site, Sites
from cluster.scheduler.source import Source, Sources
from cluster.scheduler.strain import MOST_OF_SLO, Strain
from cluster.scheduler.weighed import Sink, Weighed, rank_of
from core.config import SchedulerConfig
from core.messages.to_scheduler import Reserve
from core.slo_config import SloConfig

NUM_LENDERS = 2  # with the deepest prefixes, that pulls are weighed from


class Weighing:
    """By the costs that were learned."""

    def __init__(self, config: SchedulerConfig, learned: Learned, *, exhaustive: bool) -> None:
        """`exhaustive` weighs all replicas against each other."""
        self.sites = Sites(learned.costs, config.max_decode_kv_usage)
        self._most_itl_s = MOST_OF_SLO * config.itl_slo_s  # nobody new joins a batch beyond it
        self._held_until = inf  # when who waits for less to be computed before it may find room
        self._config = config
        self._learned = learned
        self._exhaustive = exhaustive
        self._shortlists = Shortlists(self.sites, exhaustive=exhaustive)
        self._pairing = Pairing(learned.links, learned.flights, config.zone_affinity, exhaustive=exhaustive)
        self._local_rules = LocalRules(config.local_prefill_max_tokens, config.itl_slo_s)
        self._headroom = Headroom()
        self._batch_headroom = Headroom(max(0.0, config.max_decode_kv_usage - config.max_batch_kv_usage))
        self._standard_ttft_s = config.slo.standard.ttft_s
        self._itl_slo_s = config.itl_slo_s
        self._slo_itl_s = {name: config.slo.target(name).itl_s for name in SloConfig.model_fields}
        self._usual_strain = Strain(self._standard_ttft_s, min(config.itl_slo_s, config.slo.standard.itl_s))
        self._batch_itl_s = min(config.itl_slo_s, config.slo.interactive.itl_s)  # batch work slows nobody beyond this

    def ways(self, request: Reserve, choices: Choices, coming: Mapping[str, int], num_new: float) -> list[Weighed]:
        """In no order; none: it waits. `coming`: by replica, how much of the prompt is being computed there.

        `num_new`: output tokens that are expected.
        """
        strain = self._strain(request)
        sinks = self._sinks(request, choices, coming, num_new, strain)
        if not sinks:
            return []
        lenders, links = self._lenders(request, choices), self._learned.links
        least, now = self._config.pull_min_tokens, choices.now
        sources = Sources(links, request.num_tokens, choices.cached, lenders, least, now, coming)
        weighed: list[Weighed] = []
        if request.placement != "local" and choices.prefills:
            weighed = self._pairing.pairs(self._sources(request, choices, coming, sources), sinks)
        elif not choices.prefills and (held_until := min(sink.site.has_work_until for sink in sinks)) > now:
            self._held_until = min(self._held_until, held_until)
            return []
        if request.placement != "pair" or not weighed:
            weighed += self._locals(request, choices, sources, sinks, num_new, strain, have_pairs=bool(weighed))
        return weighed

    def keeps_itl(self, num_tokens: int, decode: ReplicaView, now: float) -> bool:
        """See Policy."""
        return self.sites.of(decode).keeps_itl(self._most_itl_s, num_tokens, now)

    def take_held_until(self) -> float:
        """See Policy."""
        taken, self._held_until = self._held_until, inf
        return taken

    def changed(self, site: Site, now: float) -> None:
        """Its load has."""
        site.strain_s = self._usual_strain.seconds(site.itl_s(site.step_s, now))
        self._shortlists.changed(site)

    def lost(self, replica_id: str) -> None:
        """Forgets the replica; idempotent."""
        self._shortlists.remove(replica_id)
        self.sites.remove(replica_id)

    def _sources(self, request: Reserve, choices: Choices, coming: Mapping[str, int], sources: Sources) -> list[Source]:
        def may_prefill(site: Site) -> bool:
            takes = takes_more(site.view, is_batch=True) if request.is_batch else site.takes_more
            return takes and site.view.usable and request.num_tokens <= site.info.max_model_len

        sites = self._shortlists.of(choices.prefills, request, choices, coming, may_prefill)
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
        for site in self._shortlists.of(choices.decodes, request, choices, coming, has_room):
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

    def _lenders(self, request: Reserve, choices: Choices) -> tuple[Site, ...]:
        found: list[Site] = []
        for segment in choices.cached.segments:
            for replica_id in choices.cached.names(segment):
                view = choices.everyone.get(replica_id)
                if view is not None and view.usable and replica_id not in request.avoid:
                    found.append(self.sites.of(view))
                    if len(found) == NUM_LENDERS:
                        return tuple(found)
        return tuple(found)

"""Weighs pairs of a source and a sink, and local prefill, against each other. Pure."""

from collections.abc import Callable, Sequence
from heapq import nsmallest
from typing import NamedTuple, overload

from cluster.scheduler.candidate import Candidate, Terms
from cluster.scheduler.flights import Flights
from cluster.scheduler.handoff_time import left_s
from cluster.scheduler.link_book import LinkBook
from cluster.scheduler.site import Site
from cluster.scheduler.source import Source, Sources

NUM_LOCAL = 2  # decode replicas that local prefill is weighed on, in all


class Sink(NamedTuple):
    """A decode replica."""

    excess: float  # of the ITL over the SLO
    wait_s: float  # until its batch takes the request in
    num_reserved: int
    itl_s: float  # with the request in its batch
    num_bytes: int  # of KV that it lacks
    num_blocks: int
    depth: int  # leading blocks that it has cached
    site: Site


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

    @property
    def terms(self) -> Terms:
        """Local prefill waits for no batch: it is its own."""
        queue_s, pull_s, restore_s, prefill_s = self.source[1:5]
        wait_s = self.sink.wait_s if self.reason == "pair" else 0.0
        return Terms(queue_s, pull_s, restore_s, prefill_s, self.transfer_s, wait_s, self.itl_s)


class Explained(Sequence[Candidate]):
    """Candidates for those who ask why, written out when they do."""

    def __init__(self, weighed: Sequence[Weighed]) -> None:
        self._weighed = weighed

    def __len__(self) -> int:
        return len(self._weighed)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> "Explained": ...
    def __getitem__(self, index: int | slice) -> "Candidate | Explained":
        if isinstance(index, slice):
            return Explained(self._weighed[index])
        one = self._weighed[index]
        lender_id = one.source.lender.replica_id if one.source.lender is not None else ""
        return Candidate(one.rank[4], one.rank[5], lender_id, one.reason, one.terms)


def order_of_source(source: Source) -> tuple[float, int]:
    """Ties go to the fewest reservations."""
    return round(source.first_token_s, 4), source.site.num_reserved


def order_of_sink(sink: Sink) -> tuple[float, float, int]:
    """As of sources."""
    return sink.excess, round(sink.wait_s, 4), sink.num_reserved


class Pairing:
    """Costs that depend on both ends."""

    def __init__(self, links: LinkBook, flights: Flights, zone_affinity: str, *, exhaustive: bool = False) -> None:
        self._links = links
        self._flights = flights
        self._zones_count = zone_affinity != "ignore"
        self._must_be_near = zone_affinity == "require"
        self._exhaustive = exhaustive

    def pairs(self, sources: Sequence[Source], sinks: Sequence[Sink]) -> list[Weighed]:
        """Those that may be and that no other one is sure to beat.

        Branch and bound (Land and Doig, 1960): the bound of a pair is what its ends cost by themselves, with the
        fastest link there is. Both come ordered by that, so of equal ones the first is the one to take.
        """
        least_latency_s, least_byte_s = self._links.fastest
        sources, sinks = sorted(sources, key=order_of_source), sorted(sinks, key=order_of_sink)
        ends = [(round(s.first_token_s + s.last_bytes * least_byte_s, 4), s) for s in sources]
        prunes = not self._exhaustive
        weighed: list[Weighed] = []
        best: tuple[bool, float, float] | None = None
        for sink in sinks:
            excess, decode, num_bytes = sink.excess, sink.site, sink.num_bytes
            if num_bytes:
                least_s, wire_s = round(sink.wait_s + least_latency_s, 4), num_bytes * least_byte_s
            else:
                least_s, wire_s = round(sink.wait_s, 4), 0.0
            for bound_s, source in ends:
                prefill = source.site
                if prunes and best is not None:
                    if (False, excess, bound_s + least_s) >= best:
                        break
                    bound_s = max(bound_s, round(source.first_piece_s + wire_s, 4))
                    if (False, excess, bound_s + least_s) >= best:
                        continue
                crosses = self._zones_count and prefill.zone != decode.zone
                if (crosses and self._must_be_near) or prefill.kind != decode.kind:
                    continue
                transfer_s = self._transfer_s(source, sink) if num_bytes else 0.0
                ttft_s = round(source.first_token_s + transfer_s + sink.wait_s, 4)
                num_reserved = prefill.num_reserved + decode.num_reserved
                rank = (crosses, excess, ttft_s, num_reserved, prefill.replica_id, decode.replica_id)
                weighed.append(Weighed(rank, "pair", source, sink, transfer_s, sink.itl_s))
                if best is None or rank < best:
                    best = rank[:3]
        return weighed

    def _transfer_s(self, source: Source, sink: Sink) -> float:
        prefill, decode = source.site, sink.site
        latency_s, byte_s = self._links.cost(prefill.view, decode.view)
        backlog_bytes = self._flights.before(prefill.replica_id, decode.replica_id)
        before_s = source.first_token_s - source.prefill_s
        return latency_s + left_s(
            num_bytes=sink.num_bytes,
            last_bytes=min(source.last_bytes, sink.num_bytes),
            backlog_bytes=backlog_bytes,
            byte_s=byte_s,
            before_s=before_s,
            compute_s=source.prefill_s,
            first_s=source.first_piece_s - before_s,
        )


class LocalRules:
    """When decode may prefill a prompt by itself."""

    def __init__(self, max_tokens: int | None, itl_slo_s: float) -> None:
        self._max_tokens = max_tokens
        self._itl_slo_s = itl_slo_s

    def why(
        self, placement: str, source: Source, harm_s: float, *, have_pairs: bool, may_pair: Callable[[Site], bool]
    ) -> str:
        """The reason, empty when it may not. `harm_s`: the batch's longest step meanwhile, 0 when there is none.

        `have_pairs`: some pair is possible now; `may_pair`: whether one with this decode replica could be later.
        """
        is_idle = not source.site.busy
        if placement == "local":
            return "local_asked"
        if not have_pairs and not may_pair(source.site):
            return "local_no_prefill"
        if placement == "pair":
            return ""
        if self._max_tokens is not None:
            if source.num_uncached <= self._max_tokens:
                return "local_short"
            return "local_idle" if is_idle and not have_pairs else ""
        if not is_idle and harm_s > self._itl_slo_s:
            return ""
        if have_pairs:
            return "local_faster"
        return "local_idle" if is_idle else "local_saturated"


def few_for_local(sinks: Sequence[Sink], num_tokens: int) -> list[Sink]:
    """Those on which local prefill is fastest, pulls left aside."""

    def seconds(sink: Sink) -> float:
        site = sink.site
        num_uncached = max(1, num_tokens - sink.depth * site.block_size)
        return site.queue_s + site.prefill_s(num_uncached, num_tokens, site.beside_tokens_s)

    return nsmallest(NUM_LOCAL, sinks, key=seconds) if len(sinks) > NUM_LOCAL else list(sinks)


def weigh_local(sources: Sources, sink: Sink, num_tokens: int) -> tuple[Source, float]:
    """A decode replica as its own source, and the longest step of its batch meanwhile, 0 when there is none."""
    site = sink.site
    source = sources.of(site, site.beside_tokens_s)
    if not site.busy:
        return source, 0.0
    num_at_once = min(source.num_uncached, site.max_at_once)
    num_seen = num_tokens - num_at_once / 2
    costs = site.costs
    return source, costs.chunk_s + num_at_once * (costs.token_s + costs.pair_s * num_seen) + site.beside_tokens_s

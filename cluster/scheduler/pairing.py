"""Weighs pairs of a source and a sink, and local prefill, against each other. Pure."""

from collections.abc import Callable, Sequence
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

    excess: int  # tenths of the SLO that the ITL is beyond it
    wait_s: float  # until its batch takes the request in
    num_reserved: int
    itl_s: float  # with the request in its batch
    num_bytes: int  # of KV that it lacks
    num_blocks: int
    depth: int  # leading blocks that it has cached
    site: Site


class Weighed(NamedTuple):
    """A candidate. Ranks are integers, quick to compare; ids after them make a decision repeatable."""

    rank: int
    prefill_id: str
    decode_id: str
    reason: str
    source: Source
    sink: Sink
    transfer_s: float
    itl_s: float

    @property
    def crosses_zones(self) -> bool:
        """Its ends lie in two zones, and that counts."""
        return self.rank >= CROSSING

    @property
    def terms(self) -> Terms:
        """Local prefill waits for no batch: it is its own."""
        queue_s, pull_s, restore_s, prefill_s = self.source[1:5]
        wait_s = self.sink.wait_s if self.reason == "pair" else 0.0
        return Terms(queue_s, pull_s, restore_s, prefill_s, self.transfer_s, wait_s, self.itl_s)


# What decides, in this order: crosses zones, tenths of the SLO that the ITL is beyond it, TTFT, reservations.
RESERVATION, TICK, TENTH, CROSSING = 1, 1 << 12, 1 << 44, 1 << 60
TICKS_PER_S = 10_000  # differences below 0.1 ms are none
MOST_TENTHS = (1 << 15) - 1


def rank_of(ttft_s: float, excess: int, num_reserved: int) -> int:
    """Of a candidate within one zone, the smallest is the best."""
    return excess * TENTH + int(ttft_s * TICKS_PER_S + 0.5) * TICK + min(num_reserved, TICK - 1)


def excess_of(itl_s: float, slo_s: float) -> int:
    """Tenths of the SLO."""
    return min(MOST_TENTHS, int(10 * itl_s / slo_s - 9.5)) if itl_s > slo_s else 0


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
        return Candidate(one.prefill_id, one.decode_id, lender_id, one.reason, one.terms)


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
        fastest link there is. Likely ones come first, and of equal ones that with the fewest reservations.
        """
        least_latency_s, least_byte_s = self._links.fastest
        sent, received = self._flights.sent, self._flights.received
        ends = []
        for number, one in enumerate(sources):
            least = rank_of(one.first_token_s + one.last_bytes * least_byte_s, 0, one.site.num_reserved)
            goes_s = max(one.first_piece_s, sent.get(one.site.replica_id, 0) * least_byte_s)
            ends.append((least, number, goes_s, one))
        ends.sort()
        starts = sorted(
            (rank_of(one.wait_s + one.num_bytes * least_byte_s, one.excess, one.num_reserved), number)
            for number, one in enumerate(sinks)
        )
        weighed: list[Weighed] = []
        best = CROSSING << 1
        for _, number in starts:
            sink = sinks[number]
            num_bytes, decode = sink.num_bytes, sink.site
            latency_s = least_latency_s if num_bytes else 0.0
            least = sink.excess * TENTH + int((sink.wait_s + latency_s) * TICKS_PER_S) * TICK + sink.num_reserved
            wire_s, comes_s = num_bytes * least_byte_s, received.get(decode.replica_id, 0) * least_byte_s
            for bound, _, goes_s, source in ends:
                if not self._exhaustive:
                    if bound + least >= best:
                        break
                    begins_s = goes_s if goes_s > comes_s else comes_s
                    if num_bytes and int((begins_s + wire_s) * TICKS_PER_S) * TICK + least >= best:
                        continue
                prefill = source.site
                crosses = self._zones_count and prefill.zone != decode.zone
                if (crosses and self._must_be_near) or prefill.kind != decode.kind:
                    continue
                transfer_s = self._transfer_s(source, sink) if num_bytes else 0.0
                ttft_s = source.first_token_s + transfer_s + sink.wait_s
                rank = rank_of(ttft_s, sink.excess, prefill.num_reserved + decode.num_reserved)
                if crosses:
                    rank += CROSSING
                ids = prefill.replica_id, decode.replica_id
                weighed.append(Weighed(rank, *ids, "pair", source, sink, transfer_s, sink.itl_s))
                best = min(best, rank)
        return weighed

    def _transfer_s(self, source: Source, sink: Sink) -> float:
        prefill, decode = source.site, sink.site
        latency_s, byte_s = self._links.cost(prefill.view, decode.view)
        before_s = source.first_token_s - source.prefill_s
        return latency_s + left_s(
            sink.num_bytes,
            min(source.last_bytes, sink.num_bytes),
            self._flights.before(prefill.replica_id, decode.replica_id),
            byte_s,
            before_s,
            source.prefill_s,
            source.first_piece_s - before_s,
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


def few_for_local(sinks: Sequence[Sink], num_tokens: int) -> Sequence[Sink]:
    """Those on which local prefill is fastest, pulls left aside."""
    if len(sinks) <= NUM_LOCAL:
        return sinks
    ranked = []
    for number, sink in enumerate(sinks):
        site = sink.site
        num_uncached = max(1, num_tokens - sink.depth * site.block_size)
        seconds = site.queue_s + site.prefill_s(num_uncached, num_tokens, site.beside_tokens_s)
        ranked.append((seconds, number))
    ranked.sort()
    return [sinks[number] for _, number in ranked[:NUM_LOCAL]]


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

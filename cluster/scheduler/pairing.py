"""Weighs pairs of a source and a sink against each other. Pure."""

from collections.abc import Sequence

from cluster.scheduler.flights import Flights
from cluster.scheduler.handoff_time import left_s
from cluster.scheduler.link_book import LinkBook
from cluster.scheduler.source import Source
from cluster.scheduler.weighed import CROSSING, Sink, Weighed, rank_of


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
        ends = self._ends(sources, least_byte_s)
        starts = sorted(
            (rank_of(one.wait_s + one.num_bytes * least_byte_s + one.strain_s + one.evict_s, one.num_reserved), number)
            for number, one in enumerate(sinks)
        )
        first_ready_s = min((ready_s + others_s for _, _, ready_s, _, others_s in ends), default=0.0)
        first_goes_s = min((goes_s + others_s for _, _, _, goes_s, others_s in ends), default=0.0)
        least_reserved = min((one.site.num_reserved for one in sources), default=0)
        weighed: list[Weighed] = []
        best = CROSSING << 1
        for _, number in starts:
            sink = sinks[number]
            num_bytes, there_s, decode = sink.num_bytes, sink.strain_s + sink.evict_s, sink.site
            least_s, wired_s = sink.wait_s, 0.0
            if num_bytes:
                least_s += least_latency_s
                wired_s = num_bytes * least_byte_s + least_s
            comes_s = self._flights.received.get(decode.replica_id, 0) * least_byte_s
            if not self._exhaustive:
                bound_s = first_ready_s + least_s
                if num_bytes:
                    bound_s = max(bound_s, max(first_goes_s, comes_s) + wired_s)
                if rank_of(bound_s + there_s, least_reserved + sink.num_reserved) >= best:
                    continue  # even with the best of each source
            for _, number, ready_s, goes_s, others_s in ends:
                source = sources[number]
                prefill = source.site
                num_reserved = prefill.num_reserved + sink.num_reserved
                if not self._exhaustive:
                    if rank_of(ready_s + others_s + least_s + there_s, num_reserved) >= best:
                        break
                    if num_bytes and rank_of(max(goes_s, comes_s) + others_s + wired_s + there_s, num_reserved) >= best:
                        continue
                crosses = self._zones_count and prefill.zone != decode.zone
                if (crosses and self._must_be_near) or prefill.kind != decode.kind:
                    continue
                transfer_s = self._transfer_s(source, sink) if num_bytes else 0.0
                ttft_s = source.first_token_s + transfer_s + sink.wait_s
                rank = rank_of(ttft_s + others_s + there_s, num_reserved)
                if crosses:
                    rank += CROSSING
                weighed.append(Weighed(rank, "pair", source, sink, transfer_s, sink.itl_s, sink.strain_s))
                best = min(best, rank)
        return weighed

    def _ends(self, sources: Sequence[Source], least_byte_s: float) -> list[tuple[int, int, float, float, float]]:
        """Of each source, likely ones first: rank, number, when it can be ready and when its KV can set out, and what
        it costs others.
        """
        sent, ends = self._flights.sent, []
        for number, one in enumerate(sources):
            ready_s = one.first_token_s + one.last_bytes * least_byte_s
            goes_s = max(one.first_piece_s, sent.get(one.site.replica_id, 0) * least_byte_s)
            others_s = one.evict_s + one.work_s
            ends.append((rank_of(ready_s + others_s, one.site.num_reserved), number, ready_s, goes_s, others_s))
        ends.sort()
        return ends

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

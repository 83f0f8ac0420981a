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
        sent, received = self._flights.sent, self._flights.received
        ends = []
        for number, one in enumerate(sources):
            ready_s = one.first_token_s + one.last_bytes * least_byte_s
            goes_s = max(one.first_piece_s, sent.get(one.site.replica_id, 0) * least_byte_s)
            ends.append((rank_of(ready_s, 0, one.site.num_reserved), number, ready_s, goes_s, one))
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
            least_s = sink.wait_s + (least_latency_s if num_bytes else 0.0)
            wire_s, comes_s = num_bytes * least_byte_s, received.get(decode.replica_id, 0) * least_byte_s
            for _, _, ready_s, goes_s, source in ends:
                if not self._exhaustive:
                    num_reserved = source.site.num_reserved + sink.num_reserved
                    if rank_of(ready_s + least_s, sink.excess, num_reserved) >= best:
                        break
                    begins_s = goes_s if goes_s > comes_s else comes_s
                    if num_bytes and rank_of(begins_s + wire_s + least_s, sink.excess, num_reserved) >= best:
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

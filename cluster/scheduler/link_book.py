"""How long KV takes from one replica to another: a fit per pair of replicas, which starts from its zones' one. Pure."""

from collections.abc import Iterable
from math import inf

from cluster.scheduler.known_links import LEAST_LATENCY_S, MOST_PAIRS, KnownLinks
from cluster.scheduler.link_end import GUESSED, LINK_LATENCY_S, WITHIN_HOST, LinkCost, LinkEnd
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.robust_fit import RobustFit
from core.messages.to_scheduler import TransferSample

LEAST_SAMPLES = 3  # between two zones, before their fit is believed
LEAST_BYTES_PER_S = 1e3
LEAST_FACTOR = 1 / 16  # of a guess by ports or within hosts: whatever a fit or a report says, no link is faster
HOPE = 0.9  # of what comparable links cost, for one that was never tried

Way = tuple[str, str, bool]  # from one zone to another, and whether within a host


class LinkBook:
    """Links are told apart by the replicas at their ends, in this direction. Pairs that nothing moved between share
    what others of their zones took, beside what was guessed of these, and what other ways out of their source cost.

    One taken to be slow is never tried, so that nobody would learn how fast it is: hence guesses by ports, and hope
    for what was never tried, so that among equal ones each is tried once. At most `most_pairs` are known, and those
    forgotten that were heard of longest ago.
    """

    def __init__(self, most_pairs: int = MOST_PAIRS) -> None:
        self.fastest = GUESSED  # what no link is faster than, as far as is known
        self._least_guess_s = GUESSED.byte_s
        self._least_found_s = inf  # for a byte, by fits and reports
        self._least_factor = 1.0
        self._ends: dict[str, LinkEnd] = {}  # by replica
        self._first_on: dict[str, str] = {}  # by host, the replica that was heard of first
        self._by_way: dict[Way, RobustFit] = {}  # of seconds that bytes were guessed to take
        self._usual: dict[Way, LinkCost] = {}  # seconds, and for each guessed one
        self._known = KnownLinks(most_pairs)

    def heard(self, destination: ReplicaView, transfers: Iterable[TransferSample]) -> None:
        """A report: transfers that came in there, from replicas by id. Of those that are gone nothing is known."""
        end = destination.link_end
        if (before := self._ends.get(end.replica_id)) is not end:
            self._leave(before)
            self._ends[end.replica_id] = end
        self._least_guess_s = min(self._least_guess_s, end.through_port.byte_s)
        if self._first_on.setdefault(end.host, end.replica_id) != end.replica_id:
            self._least_guess_s = min(self._least_guess_s, WITHIN_HOST.byte_s)
        for link in destination.status.links:
            if link.bytes_per_s > 0:
                self._least_found_s = min(self._least_found_s, 1 / link.bytes_per_s)
        for source_id, num_bytes, seconds in transfers:
            source = self._ends.get(source_id)
            if source is not None and num_bytes > 0 and 0 < seconds < inf:
                self._add(source, end, num_bytes, seconds)
        self._bound()

    def cost(self, source: ReplicaView, destination: ReplicaView) -> LinkCost:
        """Of the pair, else as it reports, else hoped of others between these zones and from there, else a guess."""
        start, end = source.link_end, destination.link_end
        known = self._known.cost(start.replica_id, end.replica_id)
        if known is not None:
            return known
        guess = end.guess(start)
        least_byte_s = LEAST_FACTOR * guess.byte_s
        if destination.status.links and (bytes_per_s := destination.bytes_per_s_from(start.replica_id)) > 0:
            return LinkCost(LINK_LATENCY_S, max(1 / max(bytes_per_s, LEAST_BYTES_PER_S), least_byte_s))
        usual = self._usual_of(start, end, guess) if self._usual else None
        hoped = guess
        if usual is not None:
            hoped = LinkCost(HOPE * usual.latency_s, max(HOPE * usual.byte_s, least_byte_s))
        # what every other way out of this replica has cost: its port may be what is slow
        least = self._known.least_from(start.replica_id)
        if least is None:
            return hoped
        return LinkCost(max(hoped.latency_s, HOPE * least.latency_s), max(hoped.byte_s, HOPE * least.byte_s))

    def lost(self, replica_id: str) -> None:
        """Its links are gone."""
        self._leave(self._ends.pop(replica_id, None))
        self._known.lost(replica_id)

    def _leave(self, end: LinkEnd | None) -> None:
        if end is not None and self._first_on.get(end.host) == end.replica_id:
            del self._first_on[end.host]

    def _usual_of(self, source: LinkEnd, destination: LinkEnd, guess: LinkCost) -> LinkCost | None:
        usual = self._usual.get(_way(source, destination))
        return LinkCost(usual.latency_s, usual.byte_s * guess.byte_s) if usual is not None else None

    def _add(self, source: LinkEnd, destination: LinkEnd, num_bytes: int, seconds: float) -> None:
        guess = destination.guess(source)
        prior = self._usual_of(source, destination, guess) or guess
        start_id, end_id = source.replica_id, destination.replica_id
        cost = self._known.add(start_id, end_id, num_bytes, seconds, prior, LEAST_FACTOR * guess.byte_s)
        least_latency_s, self._least_found_s = cost.latency_s, min(self._least_found_s, cost.byte_s)
        way = _way(source, destination)
        together = self._by_way.setdefault(way, RobustFit((LINK_LATENCY_S, 1.0)))
        together.add((1, num_bytes * guess.byte_s), seconds)
        if together.num_samples >= LEAST_SAMPLES:
            latency_s, factor = together.coefficients
            usual = self._usual[way] = LinkCost(max(latency_s, LEAST_LATENCY_S), max(factor, LEAST_FACTOR))
            self._least_factor = min(self._least_factor, HOPE * usual.byte_s)
            least_latency_s = min(least_latency_s, HOPE * usual.latency_s)
        self.fastest = self.fastest._replace(latency_s=min(self.fastest.latency_s, least_latency_s))

    def _bound(self) -> None:
        """Of what a byte costs, however it is found out."""
        found_s = min(self._least_found_s, self._least_factor * self._least_guess_s)
        self.fastest = self.fastest._replace(byte_s=max(found_s, LEAST_FACTOR * self._least_guess_s))


def _way(source: LinkEnd, destination: LinkEnd) -> Way:
    return source.zone, destination.zone, source.host == destination.host

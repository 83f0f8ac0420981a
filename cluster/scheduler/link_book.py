"""How long KV takes from one replica to another: a fit per pair of replicas, which starts from its zones' one. Pure."""

from collections.abc import Iterable

from cluster.scheduler.link_end import GUESSED, LINK_LATENCY_S, WITHIN_HOST, LinkCost, LinkEnd
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.robust_fit import RobustFit
from core.messages.to_scheduler import TransferSample

LEAST_SAMPLES = 3  # between two zones, before their fit is believed
LEAST_BYTES_PER_S = 1e3
LEAST = LinkCost(1e-6, 1e-13)  # 10 TB/s
LEAST_FACTOR = 1e-3  # of a guess

Pair = tuple[str, str]  # from, to: ids of replicas
Way = tuple[str, str, bool]  # from one zone to another, and whether within a host


class LinkBook:
    """Links are told apart by the replicas at their ends, in this direction. Pairs that nothing moved between share
    what others of their zones took, beside what was guessed of these. One taken to be slow is never tried, so that
    nobody would learn how fast it is: hence guesses by ports.
    """

    def __init__(self) -> None:
        self.fastest = GUESSED  # what no link is faster than, as far as is known
        self._least_guess_s = GUESSED.byte_s
        self._ends: dict[str, LinkEnd] = {}  # by replica
        self._first_on: dict[str, str] = {}  # by host, the replica that was heard of first
        self._least_factor = 1.0
        self._by_way: dict[Way, RobustFit] = {}  # of seconds that bytes were guessed to take
        self._usual: dict[Way, LinkCost] = {}  # seconds, and for each guessed one
        self._fits: dict[Pair, RobustFit] = {}
        self._known: dict[Pair, LinkCost] = {}
        self._pairs_of: dict[str, set[Pair]] = {}

    def heard(self, destination: ReplicaView, transfers: Iterable[TransferSample]) -> None:
        """A report: transfers that came in there, from replicas by id. Of those that are gone nothing is known."""
        end = self._ends[destination.info.replica_id] = destination.link_end
        guess_s = end.through_port.byte_s
        if self._first_on.setdefault(end.host, end.replica_id) != end.replica_id:
            guess_s = min(guess_s, WITHIN_HOST.byte_s)
        if guess_s < self._least_guess_s:
            self._least_guess_s = guess_s
            self._bound(guess_s * self._least_factor)
        for link in destination.status.links:
            if link.bytes_per_s > 0:
                self._bound(1 / link.bytes_per_s)
        for source_id, num_bytes, seconds in transfers:
            if num_bytes > 0 and seconds > 0:
                self._add(source_id, end, num_bytes, seconds)

    def cost(self, source: ReplicaView, destination: ReplicaView) -> LinkCost:
        """Of the pair, else as it reports, else of pairs between these zones, else a guess."""
        start, end = source.link_end, destination.link_end
        known = self._known.get((start.replica_id, end.replica_id))
        if known is not None:
            return known
        if destination.status.links and (bytes_per_s := destination.bytes_per_s_from(start.replica_id)) > 0:
            return LinkCost(LINK_LATENCY_S, 1 / max(bytes_per_s, LEAST_BYTES_PER_S))
        usual, pairs = self._usual_of(start, end), self._pairs_of.get(start.replica_id)
        if not pairs:
            return usual
        others = [self._known[pair] for pair in pairs if pair[0] == start.replica_id]
        if not others:
            return usual
        # what every other way out of this replica has cost: its port may be what is slow
        return LinkCost(*map(max, usual, LinkCost(*map(min, *others, others[0]))))

    def lost(self, replica_id: str) -> None:
        """Its links are gone."""
        self._ends.pop(replica_id, None)
        for pair in self._pairs_of.pop(replica_id, ()):
            self._known.pop(pair, None)
            self._fits.pop(pair, None)
            for other in pair:
                self._pairs_of.get(other, set()).discard(pair)

    def _usual_of(self, source: LinkEnd | None, destination: LinkEnd) -> LinkCost:
        guess = destination.guess(source)
        if not self._usual or (usual := self._usual.get(_way(source, destination))) is None:
            return guess
        return LinkCost(usual.latency_s, usual.byte_s * guess.byte_s)

    def _add(self, source_id: str, destination: LinkEnd, num_bytes: int, seconds: float) -> None:
        source, pair = self._ends.get(source_id), (source_id, destination.replica_id)
        fit = self._fits.get(pair)
        if fit is None:
            fit = self._fits[pair] = RobustFit(self._usual_of(source, destination))
            for replica_id in pair:
                self._pairs_of.setdefault(replica_id, set()).add(pair)
        fit.add((1, num_bytes), seconds)
        cost = self._known[pair] = LinkCost(*map(max, fit.coefficients, LEAST))  # a fit may find that it costs nothing
        self.fastest = LinkCost(*map(min, self.fastest, cost))
        way = _way(source, destination)
        together = self._by_way.setdefault(way, RobustFit((LINK_LATENCY_S, 1.0)))
        together.add((1, num_bytes * destination.guess(source).byte_s), seconds)
        if together.num_samples >= LEAST_SAMPLES:
            latency_s, factor = together.coefficients
            usual = self._usual[way] = LinkCost(max(latency_s, LEAST.latency_s), max(factor, LEAST_FACTOR))
            self._least_factor = min(self._least_factor, usual.byte_s)
            self.fastest = self.fastest._replace(latency_s=min(self.fastest.latency_s, usual.latency_s))
            self._bound(self._least_guess_s * self._least_factor)

    def _bound(self, byte_s: float) -> None:
        if byte_s < self.fastest.byte_s:
            self.fastest = self.fastest._replace(byte_s=byte_s)


def _way(source: LinkEnd | None, destination: LinkEnd) -> Way:
    if source is None:
        return "", destination.zone, False
    return source.zone, destination.zone, source.host == destination.host

"""How long KV takes from one replica to another: a fit per pair of zones, a factor per pair of replicas. Pure."""

from collections.abc import Iterable
from typing import NamedTuple

from cluster.scheduler.class_fit import ClassFit
from cluster.scheduler.replica_view import ReplicaView
from core.messages.to_scheduler import TransferSample

LINK_BYTES_PER_S = 1.5e9  # until links are measured
LINK_LATENCY_S = 0.002
LEAST_SAMPLES = 3  # of a class of links, before its fit is believed
LEAST_BYTES_PER_S = 1e3


class LinkCost(NamedTuple):
    """Seconds before the first byte, and for each."""

    latency_s: float
    byte_s: float


GUESSED = LinkCost(LINK_LATENCY_S, 1 / LINK_BYTES_PER_S)


class LinkBook:
    """Links are told apart by the replicas at their ends, in this direction."""

    def __init__(self) -> None:
        self._classes: dict[tuple[str, str], ClassFit] = {}
        self._usual: dict[tuple[str, str], LinkCost] = {}  # of a class
        self._known: dict[tuple[str, str], LinkCost] = {}  # of a pair of replicas
        self._pairs_of: dict[str, set[tuple[str, str]]] = {}
        self.fastest = GUESSED  # what no link is faster than, as far as is known

    def heard(
        self, destination: ReplicaView, transfers: Iterable[TransferSample], source_zones: dict[str, str]
    ) -> None:
        """Transfers that came in there; the zones of their sources, by id, empty when unknown."""
        to_id, to_zone = destination.info.replica_id, destination.info.zone
        if links := destination.status.links:
            most_bytes_per_s = max(1 / self.fastest.byte_s, *(link.bytes_per_s for link in links))
            self.fastest = self.fastest._replace(byte_s=1 / most_bytes_per_s)
        for source_id, num_bytes, seconds in transfers:
            if num_bytes <= 0 or seconds <= 0:
                continue
            zones, pair = (source_zones.get(source_id, ""), to_zone), (source_id, to_id)
            alike = self._classes.get(zones)
            if alike is None:
                alike = self._classes[zones] = ClassFit(GUESSED)
            member = f"{source_id}>{to_id}"
            alike.add(member, (1, num_bytes), seconds)
            latency_s, byte_s = alike.fit.coefficients
            if alike.fit.num_samples >= LEAST_SAMPLES:
                factor = alike.factor(member)
                known = self._known[pair] = LinkCost(factor * latency_s, factor * byte_s)
                self._usual[zones] = LinkCost(latency_s, byte_s)
                self.fastest = LinkCost(*map(min, self.fastest, known))
            for replica_id in pair:
                self._pairs_of.setdefault(replica_id, set()).add(pair)

    def cost(self, source: ReplicaView, destination: ReplicaView) -> LinkCost:
        """Of the pair, else as it reports, else of pairs between these zones, else a guess."""
        source_id, to_id = source.info.replica_id, destination.info.replica_id
        known = self._known.get((source_id, to_id))
        if known is not None:
            return known
        if destination.status.links and (bytes_per_s := destination.bytes_per_s_from(source_id)) > 0:
            return LinkCost(LINK_LATENCY_S, 1 / max(bytes_per_s, LEAST_BYTES_PER_S))
        return self._usual.get((source.info.zone, destination.info.zone), GUESSED)

    def lost(self, replica_id: str) -> None:
        """Its links are gone."""
        for pair in self._pairs_of.pop(replica_id, ()):
            self._known.pop(pair, None)
            for links in self._classes.values():
                links.remove(f"{pair[0]}>{pair[1]}")
            for other in pair:
                self._pairs_of.get(other, set()).discard(pair)

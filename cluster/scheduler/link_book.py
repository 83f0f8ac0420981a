"""How long KV takes from one replica to another: a fit per pair of replicas, which starts from its zones' one. Pure."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.robust_fit import RobustFit
from core.messages.fleet import ReplicaInfo
from core.messages.to_scheduler import TransferSample

LINK_BYTES_PER_S = 1.5e9  # until links are measured, where replicas do not say what their ports can do
PORT_SHARE = 0.8  # of that
HOST_BYTES_PER_S = 5e9  # within a host: through its memory at least
LINK_LATENCY_S = 0.002
LEAST_SAMPLES = 3  # between two zones, before their fit is believed
LEAST_BYTES_PER_S = 1e3

Pair = tuple[str, str]  # from, to: replicas or zones


class LinkCost(NamedTuple):
    """Seconds before the first byte, and for each."""

    latency_s: float
    byte_s: float


GUESSED = LinkCost(LINK_LATENCY_S, 1 / LINK_BYTES_PER_S)
LEAST = LinkCost(1e-6, 1e-13)  # 10 TB/s


class LinkBook:
    """Links are told apart by the replicas at their ends, in this direction. Pairs that nothing moved between share."""

    def __init__(self) -> None:
        self.fastest = LinkCost(LINK_LATENCY_S, 1 / HOST_BYTES_PER_S)  # what no link is faster than, as far as is known
        self._between_zones: dict[Pair, RobustFit] = {}
        self._fits: dict[Pair, RobustFit] = {}
        self._usual: dict[Pair, LinkCost] = {}  # by zones
        self._known: dict[Pair, LinkCost] = {}  # by replicas
        self._pairs_of: dict[str, set[Pair]] = {}

    def heard(
        self, destination: ReplicaView, transfers: Iterable[TransferSample], source_zones: Mapping[str, str]
    ) -> None:
        """Transfers that came in there, and the zones of replicas by id."""
        to_id, to_zone = destination.info.replica_id, destination.info.zone
        if (port := destination.info.port_bytes_per_s) * self.fastest.byte_s > 1:
            self.fastest = self.fastest._replace(byte_s=1 / port)
        if links := destination.status.links:
            most_bytes_per_s = max(1 / self.fastest.byte_s, *(link.bytes_per_s for link in links))
            self.fastest = self.fastest._replace(byte_s=1 / most_bytes_per_s)
        for source_id, num_bytes, seconds in transfers:
            if num_bytes > 0 and seconds > 0:
                zones = source_zones.get(source_id, ""), to_zone
                self._add((source_id, to_id), zones, num_bytes, seconds, _of_ports(destination.info.port_bytes_per_s))

    def cost(self, source: ReplicaView, destination: ReplicaView) -> LinkCost:
        """Of the pair, else as it reports, else of pairs between these zones, else a guess."""
        source_id = source.info.replica_id
        known = self._known.get((source_id, destination.info.replica_id))
        if known is not None:
            return known
        if destination.status.links and (bytes_per_s := destination.bytes_per_s_from(source_id)) > 0:
            return LinkCost(LINK_LATENCY_S, 1 / max(bytes_per_s, LEAST_BYTES_PER_S))
        usual = self._usual.get((source.info.zone, destination.info.zone)) or _guess(source.info, destination.info)
        others = [self._known[pair] for pair in self._pairs_of.get(source_id, ()) if pair[0] == source_id]
        if not others:
            return usual
        # what every other way out of this replica has cost: its port may be what is slow
        return LinkCost(*map(max, usual, LinkCost(*map(min, *others, others[0]))))

    def lost(self, replica_id: str) -> None:
        """Its links are gone."""
        for pair in self._pairs_of.pop(replica_id, ()):
            self._known.pop(pair, None)
            self._fits.pop(pair, None)
            for other in pair:
                self._pairs_of.get(other, set()).discard(pair)

    def _add(self, pair: Pair, zones: Pair, num_bytes: int, seconds: float, guess: LinkCost) -> None:
        features = (1, num_bytes)
        fit = self._fits.get(pair)
        if fit is None:
            fit = self._fits[pair] = RobustFit(self._usual.get(zones, guess))
            for replica_id in pair:
                self._pairs_of.setdefault(replica_id, set()).add(pair)
        fit.add(features, seconds)
        cost = self._known[pair] = _cost_of(fit)
        self.fastest = LinkCost(*map(min, self.fastest, cost))
        together = self._between_zones.setdefault(zones, RobustFit(guess))
        together.add(features, seconds)
        if together.num_samples >= LEAST_SAMPLES:
            self._usual[zones] = _cost_of(together)


def _guess(source: ReplicaInfo, destination: ReplicaInfo) -> LinkCost:
    """A link that is taken to be slow is never tried, so that nobody would learn how fast it is."""
    if _host_of(source) == _host_of(destination):
        return LinkCost(LINK_LATENCY_S, 1 / HOST_BYTES_PER_S)
    return _of_ports(min(source.port_bytes_per_s, destination.port_bytes_per_s))


def _of_ports(bytes_per_s: float) -> LinkCost:
    return LinkCost(LINK_LATENCY_S, 1 / (PORT_SHARE * bytes_per_s)) if bytes_per_s else GUESSED


def _host_of(info: ReplicaInfo) -> str:
    return info.address.rpartition(":")[0] or info.address


def _cost_of(fit: RobustFit) -> LinkCost:
    """Positive: a fit may find that a feature costs nothing."""
    return LinkCost(*map(max, fit.coefficients, LEAST))

"""Links that something has moved over: a fit of each, and what the least of a replica's ways out has cost. Pure."""

from collections import OrderedDict

from cluster.scheduler.link_end import LinkCost
from cluster.scheduler.robust_fit import RobustFit

MOST_PAIRS = 20_000  # of replicas, at some 1.2 KB each
LEAST_LATENCY_S = 1e-6


class KnownLinks:
    """Costs are ready when asked for. Beyond `most_pairs` those are forgotten that were heard of longest ago."""

    def __init__(self, most_pairs: int = MOST_PAIRS) -> None:
        self._most_pairs = most_pairs
        self._fits: OrderedDict[tuple[str, str], RobustFit] = OrderedDict()  # by who sends and who receives
        self._ways_from: dict[str, dict[str, LinkCost]] = {}  # by who sends, then by who receives
        self._least_from: dict[str, LinkCost] = {}  # while it is known

    def __len__(self) -> int:
        return len(self._fits)

    def cost(self, source_id: str, destination_id: str) -> LinkCost | None:
        """None of a link that nothing is known of."""
        ways = self._ways_from.get(source_id)
        return ways.get(destination_id) if ways is not None else None

    def least_from(self, source_id: str) -> LinkCost | None:
        """No way out of there has cost less, neither latency nor bytes."""
        ways = self._ways_from.get(source_id)
        if ways is None:
            return None
        least = self._least_from.get(source_id)
        if least is None:
            latency_s = min([cost.latency_s for cost in ways.values()])
            byte_s = min([cost.byte_s for cost in ways.values()])
            least = self._least_from[source_id] = LinkCost(latency_s, byte_s)
        return least

    def add(
        self, source_id: str, destination_id: str, num_bytes: int, seconds: float, prior: LinkCost, least_byte_s: float
    ) -> LinkCost:
        """A transfer took so long. Returns what the link is now known to cost.

        `prior` is where the fit of a new one begins; it may find that bytes cost nothing, which is less than
        `least_byte_s`.
        """
        pair = source_id, destination_id
        fit = self._fits.get(pair)
        if fit is None:
            fit = self._fits[pair] = RobustFit(prior)
        self._fits.move_to_end(pair)
        fit.add((1, num_bytes), seconds)
        latency_s, byte_s = fit.coefficients
        cost = LinkCost(max(latency_s, LEAST_LATENCY_S), max(byte_s, least_byte_s))
        self._set(source_id, destination_id, cost)
        if len(self._fits) > self._most_pairs:
            self._forget(next(iter(self._fits)))
        return cost

    def lost(self, replica_id: str) -> None:
        """Its links are gone, both ways."""
        for pair in [pair for pair in self._fits if replica_id in pair]:
            self._forget(pair)

    def _set(self, source_id: str, destination_id: str, cost: LinkCost) -> None:
        ways = self._ways_from.setdefault(source_id, {})
        before, least = ways.get(destination_id), self._least_from.get(source_id)
        ways[destination_id] = cost
        if least is None:
            return
        if before is not None and (before.latency_s == least.latency_s or before.byte_s == least.byte_s):
            del self._least_from[source_id]  # it may have been the least alone
        else:
            self._least_from[source_id] = LinkCost(min(least.latency_s, cost.latency_s), min(least.byte_s, cost.byte_s))

    def _forget(self, pair: tuple[str, str]) -> None:
        source_id, destination_id = pair
        del self._fits[pair]
        self._least_from.pop(source_id, None)
        ways = self._ways_from[source_id]
        del ways[destination_id]
        if not ways:
            del self._ways_from[source_id]

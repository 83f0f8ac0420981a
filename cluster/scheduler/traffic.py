"""Which generation of the fleet answers a request, while two of them live side by side. Pure."""

from collections.abc import Collection, Mapping
from hashlib import blake2b

from core.messages.to_scheduler import Traffic


class TrafficSplit:
    """Shares out requests by weight; the same request always falls to the same generation.

    Without weights the first generation gets everything, so that a second one can come up beside it unnoticed. A
    generation without a weight gets nothing while another has one. The highest version that was ever heard is in
    force, so that a restarted scheduler learns it from replicas.
    """

    def __init__(self, first: str = "") -> None:
        self._first = first
        self.traffic = Traffic()

    def learn(self, traffic: Traffic) -> None:
        """Takes over what a replica remembers when it is newer."""
        if traffic.version > self.traffic.version:
            self.traffic = traffic

    def change(self, weights: dict[str, float]) -> Traffic:
        """Sets new weights and keeps those before for `roll_back`."""
        self.traffic = Traffic(self.traffic.version + 1, weights, self.traffic.weights)
        return self.traffic

    def roll_back(self) -> Traffic:
        """Returns to the weights before the last change."""
        return self.change(self.traffic.previous)

    @property
    def weights(self) -> dict[str, float]:
        """Those in force, by generation."""
        return self.traffic.weights or {self._first: 1.0}

    def choose(self, request_id: str, generations: Collection[str]) -> str:
        """One of `generations` (at least one), which are those that can take the request."""
        return choose_generation(request_id, generations, self.weights)


def choose_generation(request_id: str, generations: Collection[str], weights: Mapping[str, float]) -> str:
    """One of `generations` (at least one) by weight, by chance alike when none of them has any."""
    ordered = sorted(generations)
    shares = [weights.get(generation, 0.0) for generation in ordered]
    if not any(shares):
        shares = [1.0] * len(ordered)
    point = _unit_interval(request_id) * sum(shares)
    for generation, share in zip(ordered, shares, strict=True):
        if point < share:
            return generation
        point -= share
    return ordered[-1]


def _unit_interval(text: str) -> float:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) / 2**64

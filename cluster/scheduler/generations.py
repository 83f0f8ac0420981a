"""Which generations of the fleet can answer requests at one moment, and which of them answers a given one. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.scheduler.asked_sizes import Asked
from cluster.scheduler.fleet_view import FleetView, Pool
from cluster.scheduler.traffic import TrafficSplit
from core.errors import PromptTooLong
from core.messages.fleet import Role
from core.messages.to_scheduler import Reserve


@dataclass(frozen=True)
class Generations:
    """Where requests can go at one moment."""

    traffic: TrafficSplit
    decodes: Mapping[str, Pool]  # by generation, those without any left out
    asleep: tuple[str, ...]  # generations with traffic that were scaled to zero

    @classmethod
    def at(cls, now: float, fleet: FleetView, traffic: TrafficSplit, sizes: Mapping[str, Asked]) -> "Generations":
        """`sizes`, by generation, are what autoscalers ask for: none for one that sleeps."""
        weights = traffic.weights
        asleep = [g for g, asked in sizes.items() if weights.get(g, 0.0) > 0 and asked[Role.DECODE].num_replicas == 0]
        return cls(traffic, fleet.pools(Role.DECODE, now), tuple(asleep))

    def answering(self, request: Reserve) -> str:
        """Tokens that were shown bind a request to the weights that made them, as long as those are served.

        Another one goes where it fits: it would wait in vain elsewhere, and all others behind it. A generation that
        sleeps counts too: who waits for it makes its autoscaler bring a replica.
        """
        if not self.decodes:
            return self.traffic.choose(request.request_id, self.traffic.weights)
        if request.generation and request.generation in self.decodes:
            return request.generation
        num_tokens = request.num_tokens + request.max_new_tokens
        fitting = [g for g, pool in self.decodes.items() if num_tokens <= pool.longest]
        return self.traffic.choose(request.request_id, {*(fitting or self.decodes), *self.asleep})

    def too_long(self, request: Reserve) -> PromptTooLong | None:
        """The error when no decode replica can ever hold a request."""
        limit = max((pool.longest for pool in self.decodes.values()), default=None)
        if limit is None or request.num_tokens + request.max_new_tokens <= limit:
            return None
        return PromptTooLong(
            f"{request.num_tokens} prompt and {request.max_new_tokens} output tokens exceed the {limit} tokens "
            "that a decode replica's KV cache holds",
            field="max_tokens",
        )

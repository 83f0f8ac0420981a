"""How fast a pool computes prompts, all its replicas together. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.scheduler.site import Site
from cluster.scheduler.step_costs import num_pairs

LEAST_STEP_S = 1e-6  # coefficients of a fit may be 0


@dataclass(frozen=True)
class Pace:
    """Of replicas whose steps are full."""

    num_replicas: int
    tokens_per_s: float
    pair_s: float  # of one replica on average: a token's attention to another
    begins_s: float  # until the next prompt is begun: between the first replica that is free and the average

    @classmethod
    def of(cls, sites: Sequence[Site], now: float, *, are_decodes: bool) -> "Pace":
        """Of at least one. What decodes pays for its batch in each step, too."""
        num, tokens_per_s, pair_s = len(sites), 0.0, 0.0
        queues_s = [site.queue_left_s(now) for site in sites]
        for site in sites:
            costs, beside_s = site.costs, site.beside_tokens_s if are_decodes else 0.0
            step_s = max(LEAST_STEP_S, costs.chunk_s + costs.token_s * site.max_at_once + beside_s)
            tokens_per_s += site.max_at_once / step_s
            pair_s += costs.pair_s / num
        return cls(num, tokens_per_s, pair_s, (min(queues_s) + fmean(queues_s)) / 2)

    def work_s(self, num_uncached: int, num_tokens: int) -> float:
        """For so long a prompt occupies the whole pool."""
        pairs_s = self.pair_s * num_pairs(num_uncached, num_tokens - num_uncached)
        return num_uncached / self.tokens_per_s + pairs_s / self.num_replicas

    def first_token_s(self, work_s: float) -> float:
        """On one replica that has nothing to compute before it."""
        return self.num_replicas * work_s

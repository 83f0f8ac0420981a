"""Whether a decode replica can hold a request through its expected length, beside those that grow there. Pure.

A batch needs most when one of its sequences is about to end: those that are shorter have gone, the others have grown.
With remaining tokens r_1 <= r_2 <= ... and tokens held h_i, what is needed beyond the present at that moment of k is

    sum_i min(r_i, r_k) - sum_{i: r_i < r_k} (h_i + r_i)

(the "future required memory" of Gong et al., Past-Future Scheduler, 2025). Its maximum over k must fit.
"""

from collections.abc import Iterable

from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.site import Site

OVERDUE_SHARE = 0.25  # of its expected length that a request is taken to go on for when it has outlived that


class Headroom:
    """Of one configuration."""

    def __init__(self, max_kv_usage: float) -> None:
        self._max_kv_usage = max_kv_usage

    def fits(self, site: Site, num_tokens: int, num_new: float, num_at_once: int, now: float) -> bool:
        """A sequence of `num_tokens` tokens, computed `num_at_once` a step, that will generate `num_new`."""
        if site.whole_blocks:
            needed = num_tokens // site.block_size + 1
        else:
            needed = site.layout.num_blocks_held(num_tokens + 1, num_at_once)
        left = site.free_blocks - needed
        if left < 0 or not site.has_slot:
            return False
        if not site.busy:
            return True  # nobody grows beside it: it can only have the whole cache
        num_new = min(num_new, site.info.max_model_len - num_tokens)
        if left >= site.grown_blocks + site.block_share * num_new:
            return True  # even if nobody ended before all have grown
        growing = [*_growing(site.view, site.costs.step_s, now), (num_new, float(num_tokens))]
        return left >= site.block_share * most_growth(growing)


def most_growth(growing: Iterable[tuple[float, float]]) -> float:
    """Tokens needed at most beyond the present, given (remaining, held) of each."""
    ordered = sorted(growing)
    most = freed = grown = 0.0  # the latter two of those that have ended
    for number, (remaining, held) in enumerate(ordered):
        most = max(most, grown + remaining * (len(ordered) - number) - freed)
        grown += remaining
        freed += held + remaining
    return most


def _growing(decode: ReplicaView, itl_s: float, now: float) -> Iterable[tuple[float, float]]:
    for growth in decode.growth.values():
        made = (now - growth.since) / itl_s if growth.since is not None and itl_s > 0 else 0.0
        remaining = growth.num_new_tokens - made
        if remaining <= 0:
            remaining = OVERDUE_SHARE * growth.num_new_tokens
        yield remaining, growth.num_tokens + made

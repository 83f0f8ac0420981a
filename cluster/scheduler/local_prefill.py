"""When decode may prefill a prompt by itself, and where that is fastest. Pure."""

from collections.abc import Callable, Sequence

from cluster.scheduler.site import Site
from cluster.scheduler.source import WORK_COUNTS, Source, Sources
from cluster.scheduler.strain import Strain
from cluster.scheduler.weighed import Sink

NUM_LOCAL = 2  # decode replicas that local prefill is weighed on, in all


class LocalRules:
    """When decode may prefill a prompt by itself."""

    def __init__(self, max_tokens: int | None, itl_slo_s: float) -> None:
        self._max_tokens = max_tokens
        self._itl_slo_s = itl_slo_s

    def why(
        self, placement: str, source: Source, harm_s: float, *, have_pairs: bool, may_pair: Callable[[Site], bool]
    ) -> str:
        """The reason, empty when it may not. `harm_s`: the batch's longest step meanwhile, 0 when there is none.

        `have_pairs`: some pair is possible now; `may_pair`: whether one with this decode replica could be later.
        """
        is_idle = not source.site.busy
        if placement == "local":
            return "local_asked"
        if not have_pairs and not may_pair(source.site):
            return "local_no_prefill"
        if placement == "pair":
            return ""
        if self._max_tokens is not None:
            if source.num_uncached <= self._max_tokens:
                return "local_short"
            return "local_idle" if is_idle and not have_pairs else ""
        if not is_idle and harm_s > self._itl_slo_s:
            return ""
        if have_pairs:
            return "local_faster"
        return "local_idle" if is_idle else "local_saturated"


def few_for_local(sinks: Sequence[Sink], num_tokens: int, strain: Strain, now: float) -> Sequence[Sink]:
    """Those on which local prefill costs least, pulls left aside."""
    if len(sinks) <= NUM_LOCAL:
        return sinks
    ranked = []
    for number, sink in enumerate(sinks):
        site = sink.site
        num_uncached = max(1, num_tokens - sink.depth * site.block_size)
        prefill_s = site.prefill_s(num_uncached, num_tokens, site.beside_tokens_s)
        seconds = site.queue_left_s(now) + (1 + WORK_COUNTS) * prefill_s
        itl_s = site.itl_s(sink.step_s, now, prefill_s, site.num_steps(num_uncached))
        ranked.append((seconds + sink.evict_s + strain.seconds(itl_s), number))
    ranked.sort()
    return [sinks[number] for _, number in ranked[:NUM_LOCAL]]


def weigh_local(sources: Sources, sink: Sink, num_tokens: int) -> tuple[Source, float]:
    """A decode replica as its own source, and the longest step of its batch meanwhile, 0 when there is none."""
    site = sink.site
    source = sources.of(site, site.beside_tokens_s)
    if not site.busy:
        return source, 0.0
    num_at_once = min(source.num_uncached, site.max_at_once)
    num_seen = num_tokens - num_at_once / 2
    costs = site.costs
    return source, costs.chunk_s + num_at_once * (costs.token_s + costs.pair_s * num_seen) + site.beside_tokens_s

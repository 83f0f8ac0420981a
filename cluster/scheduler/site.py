"""All that a decision asks of one replica, worked out when its view or its costs change. Pure."""

from cluster.scheduler.cost_book import CostBook
from cluster.scheduler.matches import Matches
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import STEPS_HELD, takes_more
from cluster.scheduler.stalls import Stalls
from cluster.scheduler.step_costs import StepCosts, kv_bytes_per_token
from core.messages.fleet import ReplicaInfo, Role

OF_ALONE, OF_ALONE_POWER = 0.8, 8  # of an ITL; where a sequence alone takes all of it the limit is six times that
REUSE_OF_OLDEST = 0.05  # a guess: of the blocks that are evicted next, those that would have been found again
# Of blocks that come from below the device, until a replica has measured its tiers: PCIe copies, an NVMe disk.
GUESSED_RESTORE_BYTES_PER_S = {"host": 5e9, "disk": 1e9}


class Site:
    """One replica: the first group changes with its info, the second with each report and reservation."""

    __slots__ = (
        "begun_at",
        "beside_tokens_s",
        "block_bytes",
        "block_share",
        "block_size",
        "busy",
        "costs",
        "empty_blocks",
        "free_blocks",
        "grown_blocks",
        "has_slot",
        "info",
        "kind",
        "kv_layer_bytes",
        "layout",
        "left_of_step_s",
        "max_at_once",
        "num_layers",
        "num_queued",
        "num_reserved",
        "queue_s",
        "reaches",
        "replica_id",
        "stalls",
        "step_s",
        "strain_s",
        "takes_more",
        "view",
        "whole_blocks",
        "zone",
    )  # fmt: skip

    def __init__(self, view: ReplicaView, kind: int) -> None:
        """`kind` is equal for those that can pair."""
        info = view.info
        layout = info.layout
        self.view = view
        self.info: ReplicaInfo = info
        self.replica_id = info.replica_id
        self.zone = info.zone
        self.kind = kind
        self.layout = layout
        self.block_size = layout.block_size
        self.block_bytes = layout.block_bytes
        self.kv_layer_bytes = kv_bytes_per_token(layout) / layout.num_layers  # of one token
        self.num_layers = layout.num_layers
        self.reaches = layout.reaches
        self.whole_blocks = layout.reaches == (None,)  # one group of all tokens
        num_growing = sum(group.window is None for group in layout.kv_groups)
        self.block_share = num_growing / layout.block_size  # blocks per token of growth
        self.max_at_once = info.max_num_batched_tokens
        self.stalls = Stalls()
        self.strain_s = 0.0  # of its batch as of the last change, by usual SLOs: the policy's to say
        self.begun_at = 0.0  # since when it works at what is first in `queue_s`

    def refresh(self, costs: StepCosts, max_kv_usage: float) -> None:
        """From the view as it is now."""
        view = self.view
        status = view.status
        self.costs = costs
        self.num_reserved = view.num_reservations
        self.takes_more = takes_more(view)
        num_decoding = view.num_decode_requests
        self.beside_tokens_s = costs.token_s * num_decoding + costs.beside_s * status.num_kv_tokens
        is_decode = self.info.role is Role.DECODE
        self.num_queued = view.outstanding_prefill_tokens
        self.queue_s = _queue_s(view, costs, self.beside_tokens_s if is_decode else 0.0)
        self.busy = num_decoding > 0
        self.has_slot = num_decoding < self.info.max_num_seqs
        self.free_blocks = view.num_free_blocks - (
            (1 - max_kv_usage) * self.info.num_blocks if self.busy else 0.0
        )  # above the watermark
        self.empty_blocks = min(view.num_free_blocks, self.info.num_blocks - view.num_cached_blocks)
        coming = view.num_reserved_blocks * self.block_size
        grown = view.num_expected_tokens - status.num_kv_tokens - coming
        self.grown_blocks = self.block_share * max(0.0, grown)  # that its requests will come to need, in all
        self.step_s = costs.decode_step_s(num_decoding + 1, status.num_kv_tokens + coming)  # with one sequence more
        prompts_s = costs.token_s * min(self.num_queued, self.max_at_once) if view.prefill_tokens else 0.0
        self.left_of_step_s = (self.step_s + prompts_s) / 2 if self.busy else 0.0  # under way, on average

    @property
    def full_step_s(self) -> float:
        """Of as many prompt tokens as a step takes, beside the batch."""
        return self.costs.chunk_s + self.costs.token_s * self.max_at_once + self.beside_tokens_s

    @property
    def has_work_until(self) -> float:
        """Until then it has prompts for a full step beside what is over of the one under way; before it idles it is
        given more.
        """
        return self.begun_at + self.queue_s - STEPS_HELD * self.full_step_s

    def itl_s(self, step_s: float, now: float, more_s: float = 0.0, num_more: int = 0) -> float:
        """Of its batch, if it has one, whose steps take `step_s` without the prompts that it computes, and one more."""
        if not self.busy:
            return step_s
        return self.stalls.itl_s(step_s, now, self.queue_s + more_s, self.num_steps(self.num_queued) + num_more)

    def keeps_itl(self, most_itl_s: float, num_tokens: float, now: float) -> bool:
        """Whether its batch, if it has one, stays within an ITL with a sequence of so many tokens more.

        Where a sequence alone takes nearly as long, waiting helps nobody: the limit rises steeply from OF_ALONE on.
        """
        if not self.busy:
            return True
        itl_s = self.itl_s(self.step_s + self.costs.context_s * num_tokens, now)
        if itl_s <= most_itl_s:
            return True
        alone = self.costs.decode_step_s(1, 0) / most_itl_s
        return itl_s <= most_itl_s * (alone / OF_ALONE) ** OF_ALONE_POWER

    def num_steps(self, num_tokens: int) -> int:
        """That compute so many tokens of prompts."""
        return -(-num_tokens // self.max_at_once)

    def queue_left_s(self, now: float) -> float:
        """Of `queue_s`: a step under way is the nearer to its end the longer it runs, and nobody reports that."""
        return max(0.0, self.queue_s - (now - self.begun_at)) if self.queue_s else 0.0

    def prefill_s(self, num_uncached: int, num_tokens: int, beside_s: float) -> float:
        """Computing the last tokens of a prompt; `beside_s`: what others add to each step."""
        return self.costs.prefill_s(num_uncached, num_tokens - num_uncached, self.max_at_once, beside_s)

    def num_missing(self, depth: int, num_tokens: int) -> int:
        """Blocks that a prompt's first output token needs, and that are not among its first `depth`."""
        if self.whole_blocks:
            return -(-num_tokens // self.block_size) - depth
        return self.layout.num_blocks_missing(depth, num_tokens)

    def evict_s(self, num_blocks: int) -> float:
        """What others lose when so many blocks take the place of cached ones, as far as no empty ones are left; where
        there are tiers below, these have them.
        """
        if self.view.status.tiers:
            return 0.0
        num_evicted = num_blocks - max(0, self.empty_blocks)
        return REUSE_OF_OLDEST * num_evicted * self.block_size * self.costs.token_s if num_evicted > 0 else 0.0

    def restore_s(self, matches: Matches, depth: int) -> float:
        """Until its own blocks from below the device are on it."""
        seconds, tiers = 0.0, self.view.status.tiers
        for tier, num_blocks in matches.num_below(self.replica_id, depth, self.reaches).items():
            known = tiers[tier] if tier < len(tiers) else None
            guess = GUESSED_RESTORE_BYTES_PER_S.get(known.name if known else "", 1e9)
            bytes_per_s = (known.restore_bytes_per_s if known else 0.0) or guess
            seconds += num_blocks * self.block_bytes / bytes_per_s
        return seconds


class Sites:
    """By replica."""

    def __init__(self, costs: CostBook, max_kv_usage: float) -> None:
        self._costs = costs
        self._max_kv_usage = max_kv_usage
        self._sites: dict[str, Site] = {}
        self._kinds: dict[tuple[object, ...], int] = {}

    def of(self, view: ReplicaView) -> Site:
        """As of the last `refresh`."""
        site = self._sites.get(view.info.replica_id)
        return site if site is not None and site.view is view else self.refresh(view)

    def refresh(self, view: ReplicaView) -> Site:
        """The view has changed."""
        info = view.info
        site = self._sites.get(info.replica_id)
        if site is None or site.view is not view or site.info is not info:
            what = info.compatibility, info.layout.groups, info.generation
            kind = self._kinds.setdefault(what, len(self._kinds))
            site = self._sites[info.replica_id] = Site(view, kind)
        site.refresh(self._costs.of(view), self._max_kv_usage)
        return site

    def known(self, view: ReplicaView) -> Site | None:
        """As of the last `refresh`; None of one that was lost, or that came again as another."""
        site = self._sites.get(view.info.replica_id)
        return site if site is not None and site.view is view else None

    def find(self, replica_id: str) -> Site | None:
        """As of the last `refresh`, if there was one."""
        return self._sites.get(replica_id)

    def remove(self, replica_id: str) -> None:
        """Idempotent."""
        self._sites.pop(replica_id, None)


def _queue_s(view: ReplicaView, costs: StepCosts, beside_s: float) -> float:
    """Until a new prompt's first chunk runs: what is there before it, at the replica's pace.

    Each prompt was foreseen alone; short ones share steps, and what a step takes whatever is in it, `beside_s` too.
    """
    num_tokens = view.outstanding_prefill_tokens
    if not num_tokens:
        return 0.0
    if view.num_reserved_tokens:
        alone_s = view.reserved_prefill_s * num_tokens / view.num_reserved_tokens
        num_steps = -(-num_tokens // view.info.max_num_batched_tokens)
        shared_s = max(0, len(view.prefill_tokens) - num_steps) * (costs.chunk_s + beside_s)
        return max(alone_s - shared_s, costs.token_s * num_tokens)
    return costs.prefill_s(num_tokens, 0, view.info.max_num_batched_tokens)

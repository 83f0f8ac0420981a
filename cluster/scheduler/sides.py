"""What each end of a handoff contributes to a request's TTFT by itself, before they are paired. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from cluster.scheduler.cost_book import CostBook
from cluster.scheduler.link_book import LinkBook
from cluster.scheduler.matches import Matches
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair, uncached_tokens
from cluster.scheduler.step_costs import StepCosts
from core.messages.to_scheduler import Reserve

# Of blocks that come from below the device, until a replica has measured its tiers: PCIe copies, an NVMe disk.
GUESSED_RESTORE_BYTES_PER_S = {"host": 5e9, "disk": 1e9}


class Source(NamedTuple):
    """Whoever prefills: a prefill replica, or decode itself."""

    first_token_s: float  # sum of the next four
    queue_s: float
    pull_s: float
    restore_s: float
    prefill_s: float
    num_uncached: int
    lender: ReplicaView | None
    view: ReplicaView


class Sink(NamedTuple):
    """A decode replica."""

    wait_s: float
    itl_s: float  # with the request in its batch
    num_bytes: int  # of KV that it lacks
    num_blocks: int
    depth: int  # leading blocks that it has cached
    view: ReplicaView


@dataclass(frozen=True)
class Ask:
    """One request, and what is the same of it for all replicas."""

    request: Reserve
    matches: Matches
    lenders: tuple[ReplicaView, ...]  # those with the deepest prefixes, deepest first
    num_new: float  # tokens that it is expected to generate


class Sides:
    """Costs of one end."""

    def __init__(self, costs: CostBook, links: LinkBook, pull_min_tokens: int) -> None:
        self._costs = costs
        self._links = links
        self._pull_min_tokens = pull_min_tokens

    def queue_s(self, view: ReplicaView) -> float:
        """Until a new prompt's first chunk runs: what is there before it, at the replica's pace."""
        num_tokens = view.outstanding_prefill_tokens
        if not num_tokens:
            return 0.0
        if view.num_reserved_tokens:
            return view.reserved_prefill_s * num_tokens / view.num_reserved_tokens
        return self._costs.of(view).prefill_s(num_tokens, 0, view.info.max_num_batched_tokens)

    def itl_s(self, view: ReplicaView, num_more: int, num_tokens: float) -> float:
        """Of a batch with so many more sequences and context tokens in it."""
        costs, status = self._costs.of(view), view.status
        num_decoding = view.num_decode_requests + num_more
        coming = view.num_reserved_blocks * view.info.layout.block_size
        itl_s = costs.decode_step_s(num_decoding, status.num_kv_tokens + coming + num_tokens)
        if view.prefill_tokens:
            itl_s += costs.token_s * min(view.outstanding_prefill_tokens, view.info.max_num_batched_tokens)
        return itl_s

    def source(self, ask: Ask, view: ReplicaView) -> Source:
        """As whoever prefills, with the best lender if pulling pays."""
        info, request = view.info, ask.request
        costs, queue_s = self._costs.of(view), self.queue_s(view)
        depth = ask.matches.depth(info.replica_id)
        best = self._computed(ask, view, costs, queue_s, depth)
        for lender in ask.lenders:
            lent = ask.matches.depth(lender.info.replica_id)
            num_saved = best.num_uncached - uncached_tokens(request, lent, view)
            if lender is view or num_saved < self._pull_min_tokens or not can_pair(lender.info, info):
                continue
            pulled = self._pulled(ask, view, costs, queue_s, depth, lender, lent)
            if pulled.first_token_s < best.first_token_s:
                best = pulled
        return best

    def sink(self, ask: Ask, view: ReplicaView) -> Sink:
        """As decode."""
        info = view.info
        layout, num_tokens = info.layout, ask.request.num_tokens
        depth = ask.matches.depth(info.replica_id)
        num_blocks = layout.num_blocks_missing(depth, num_tokens)
        itl_s = self.itl_s(view, 1, num_tokens + ask.num_new / 2)
        wait_s = itl_s / 2 if view.num_decode_requests else 0.0  # of the step under way, on average
        num_bytes = num_blocks * layout.block_bytes_per_rank * layout.tensor_parallel
        return Sink(wait_s, itl_s, num_bytes, num_blocks, depth, view)

    def chunk_step_s(self, ask: Ask, view: ReplicaView, source: Source) -> float:
        """The longest step while a decode replica prefills a prompt beside its batch."""
        info, status = view.info, view.status
        num_tokens = min(source.num_uncached, info.max_num_batched_tokens)
        num_before = ask.request.num_tokens - num_tokens  # of the last chunk
        num_decoding = view.num_decode_requests
        return self._costs.of(view).chunk_step_s(num_tokens, num_before, num_decoding, status.num_kv_tokens)

    def beside_s(self, view: ReplicaView, source: Source) -> float:
        """What the batch that decodes along adds to the steps of a prompt."""
        costs = self._costs.of(view)
        num_steps = -(-source.num_uncached // view.info.max_num_batched_tokens)
        return num_steps * (costs.token_s * view.num_decode_requests + costs.beside_s * view.status.num_kv_tokens)

    def _computed(self, ask: Ask, view: ReplicaView, costs: StepCosts, queue_s: float, depth: int) -> Source:
        num_uncached = uncached_tokens(ask.request, depth, view)
        num_cached = ask.request.num_tokens - num_uncached
        restore_s = self._restore_s(ask.matches, view, depth)
        prefill_s = costs.prefill_s(num_uncached, num_cached, view.info.max_num_batched_tokens)
        total_s = queue_s + restore_s + prefill_s
        return Source(total_s, queue_s, 0.0, restore_s, prefill_s, num_uncached, None, view)

    def _pulled(
        self, ask: Ask, view: ReplicaView, costs: StepCosts, queue_s: float, depth: int, lender: ReplicaView, lent: int
    ) -> Source:
        """What the lender has more comes over the link, from its own tiers first."""
        alone = self._computed(ask, view, costs, queue_s, lent)
        layout = view.info.layout
        num_blocks = layout.num_blocks_missing(depth, lent * layout.block_size)
        link = self._links.cost(lender, view)
        bytes_s = num_blocks * layout.block_bytes_per_rank * layout.tensor_parallel * link.byte_s
        pull_s = 2 * link.latency_s + bytes_s + self._restore_s(ask.matches, lender, lent)  # asked for, then fetched
        restore_s = self._restore_s(ask.matches, view, depth)
        total_s = queue_s + pull_s + restore_s + alone.prefill_s
        return Source(total_s, queue_s, pull_s, restore_s, alone.prefill_s, alone.num_uncached, lender, view)

    def _restore_s(self, matches: Matches, view: ReplicaView, depth: int) -> float:
        """Until its own blocks from below the device are on it."""
        layout = view.info.layout
        seconds = 0.0
        for tier, num_blocks in matches.num_below(view.info.replica_id, depth, layout.reaches).items():
            known = view.status.tiers[tier] if tier < len(view.status.tiers) else None
            guess = GUESSED_RESTORE_BYTES_PER_S.get(known.name if known else "", 1e9)
            bytes_per_s = (known.restore_bytes_per_s if known else 0.0) or guess
            seconds += num_blocks * layout.block_bytes_per_rank * layout.tensor_parallel / bytes_per_s
        return seconds

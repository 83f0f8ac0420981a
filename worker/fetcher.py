"""Brings blocks of another replica to every rank of this one."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.errors import BatonError, TransferFailed
from core.messages.fleet import ReplicaInfo
from core.messages.to_rank import Copy, FetchBlocks, Fetched, PreparePairs, SlabHeader, Span
from core.version import PIPELINE_PROTOCOL
from kv_transfer.plan import Move, plan_stages, source_ranks
from rpc import methods
from worker.rank_context import RankContext


@dataclass(frozen=True)
class BlockOrder:
    """Layers of some blocks of one KV group, from a source that lets this name and attempt read them.

    Layers are places in these blocks, as numbered for the whole model; blocks are physical.
    """

    name: str  # of the request, or of the loan
    attempt: int
    lease_id: int
    source: ReplicaInfo
    first_layer: int
    num_layers: int
    first_block: int  # logical, the first of source_blocks
    source_blocks: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    due_s: float
    group: int = 0


class Fetcher:
    """Plans each rank's copies and has them all done; each rank receives from the source ranks that hold its layers
    and heads.

    Latents, which every rank needs alike, come once from the source; the ranks then hand them on to each other.
    """

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._handing_on: Counter[tuple[str, int]] = Counter()  # fetches by (name, attempt)
        self._prepared: dict[str, int] = {}  # incarnations by replica id

    async def fetch(self, order: BlockOrder) -> Fetched:
        """Bytes of all ranks, seconds of the slowest. Raises a BatonError only when no rank writes any more."""
        layout = self._context.info.layout
        move = self._move(order)
        stages = [plan_stages(move, rank) for rank in range(layout.num_ranks)]
        timeout_s = self._context.spec.transfer.data_timeout_s
        fetch = FetchBlocks(
            order.name,
            order.attempt,
            order.source.rank_addresses,
            order.source.layout,
            (),
            timeout_s,
            order.lease_id,
            order.first_block,
            order.source_blocks,
            order.due_s,
            order.group,
        )
        fetched = await self._on_all_ranks(fetch, [stage.from_source for stage in stages])
        if not any(copy.source_rank == 0 for stage in stages for copy in stage.from_source):
            await self._require_held(order)
        if not any(stage.from_siblings for stage in stages):
            return fetched
        fetch = replace(
            fetch,
            source_addresses=self._context.info.rank_addresses,
            source_layout=layout,
            timeout_s=timeout_s - fetched.seconds,
            first_block=order.first_block * order.source.layout.block_size // layout.block_size,
            source_blocks=order.destination_blocks,
        )
        key = (order.name, order.attempt)
        self._handing_on[key] += 1
        try:
            handed_on = await self._on_all_ranks(fetch, [stage.from_siblings for stage in stages])
        finally:
            self._handing_on -= Counter([key])
        return Fetched(
            fetched.num_bytes + handed_on.num_bytes,
            fetched.seconds + handed_on.seconds,
            fetched.num_digests + handed_on.num_digests,
        )

    async def prepare(self, source: ReplicaInfo) -> None:
        """Connects all ranks to those that they will fetch from, ahead of the first fetch. Raises PeerLost.

        Once per incarnation of a source: channels that made room since are made again by their next fetch.
        """
        if self._prepared.get(source.replica_id) == source.incarnation:
            return
        self._prepared[source.replica_id] = source.incarnation
        context, layout = self._context, self._context.info.layout
        timeout_s = context.spec.transfer.control_timeout_s
        for rank in range(layout.num_ranks):
            peers = source_ranks(source.layout, layout, rank)
            addresses = tuple(source.rank_addresses[peer] for peer in peers)
            if rank == context.spec.rank:
                context.agent.prepare(addresses)
            else:
                address = context.info.rank_addresses[rank]
                await context.client.call(address, methods.PREPARE_PAIRS, PreparePairs(addresses), timeout_s)

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a sibling rank asks for what this replica is handing on."""
        return (header.request_id, header.attempt) in self._handing_on

    def _move(self, order: BlockOrder) -> Move:
        source, destination = order.source.layout, self._context.info.layout
        first_token = order.first_block * source.block_size
        num_tokens = min(
            len(order.source_blocks) * source.block_size, len(order.destination_blocks) * destination.block_size
        )
        return Move(
            source,
            destination,
            range(order.first_layer, order.first_layer + order.num_layers),
            order.source_blocks,
            order.destination_blocks,
            range(first_token, first_token + num_tokens),
            order.group,
        )

    async def _require_held(self, order: BlockOrder) -> None:
        """Of the ranks of a replica the first one alone knows what may be read: where it gave nothing, it is asked
        whether all was still held when it had come. Raises TransferFailed when it was not.
        """
        if order.source.protocol < PIPELINE_PROTOCOL:
            return
        blocks = order.source_blocks
        span = Span(order.first_layer, order.num_layers, blocks, 0, 1)
        logical = tuple(range(order.first_block, order.first_block + len(blocks)))
        header = SlabHeader(0, order.name, order.attempt, span, order.lease_id, logical, order.group)
        timeout_s = self._context.spec.transfer.control_timeout_s
        answer = await self._context.client.call(order.source.address, methods.HOLDS, header, timeout_s)
        if not answer.known:
            raise TransferFailed(f"{order.source.replica_id} no longer held the blocks of request {order.name}")

    async def _on_all_ranks(self, fetch: FetchBlocks, copies: Sequence[tuple[Copy, ...]]) -> Fetched:
        """The order with each rank's copies, if it has any; returns or raises when every rank is done."""
        fetches = (self._fetch_on(rank, replace(fetch, copies=part)) for rank, part in enumerate(copies) if part)
        results = await asyncio.gather(*fetches, return_exceptions=True)
        num_bytes, seconds, num_digests = 0, 0.0, 0
        for result in results:
            if isinstance(result, BatonError):
                raise result
            if isinstance(result, BaseException):
                raise TransferFailed(f"fetch failed: {result!r}") from result
            num_bytes += result.num_bytes
            seconds = max(seconds, result.seconds)
            num_digests += result.num_digests
        return Fetched(num_bytes, seconds, num_digests)

    async def _fetch_on(self, rank: int, fetch: FetchBlocks) -> Fetched:
        context = self._context
        if rank == context.spec.rank:
            return await context.agent.fetch(fetch)
        answer_s = fetch.timeout_s + 2 * context.spec.transfer.control_timeout_s
        return await context.client.call(context.info.rank_addresses[rank], methods.FETCH_BLOCKS, fetch, answer_s)

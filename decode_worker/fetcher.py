"""Brings the bytes of one announcement to every rank of this replica."""

import asyncio
from dataclasses import replace

from core.errors import BatonError, TransferFailed
from core.messages.to_rank import Copy, FetchBlocks, Fetched
from decode_worker.handoffs import Fetch
from kv_transfer.plan import Stages, plan_stages
from rpc import methods
from worker.rank_context import RankContext


class Fetcher:
    """Plans each rank's copies and has them all done; each rank receives from the source ranks that hold its heads.

    Latents, which every rank needs alike, come once from the source; the ranks then hand them on to each other.
    """

    def __init__(self, context: RankContext) -> None:
        self._context = context

    async def fetch(self, fetch: Fetch) -> Fetched:
        """Bytes of all ranks, seconds of the slowest. Raises a BatonError only when no rank writes any more."""
        announce, context = fetch.announce, self._context
        stages = [self._stages(rank, fetch) for rank in range(context.info.layout.tensor_parallel)]
        timeout_s = context.spec.transfer.data_timeout_s
        order = FetchBlocks(
            announce.request_id,
            announce.attempt,
            announce.source.rank_addresses,
            announce.source.layout,
            (),
            timeout_s,
        )
        fetched = await self._on_all_ranks(order, [stage.from_source for stage in stages])
        if not any(stage.from_siblings for stage in stages):
            return fetched
        order = replace(
            order,
            source_addresses=context.info.rank_addresses,
            source_layout=context.info.layout,
            timeout_s=timeout_s - fetched.seconds,
        )
        handed_on = await self._on_all_ranks(order, [stage.from_siblings for stage in stages])
        return Fetched(fetched.num_bytes + handed_on.num_bytes, fetched.seconds + handed_on.seconds)

    def _stages(self, rank: int, fetch: Fetch) -> Stages:
        announce, context = fetch.announce, self._context
        source, destination = announce.source.layout, context.info.layout
        first_token = announce.first_block * source.block_size
        num_tokens = min(
            len(announce.source_blocks) * source.block_size, len(fetch.destination_blocks) * destination.block_size
        )
        return plan_stages(
            source,
            destination,
            rank,
            announce.first_layer,
            announce.num_layers,
            announce.source_blocks,
            fetch.destination_blocks,
            range(first_token, first_token + num_tokens),
        )

    async def _on_all_ranks(self, order: FetchBlocks, copies: list[tuple[Copy, ...]]) -> Fetched:
        """The order with each rank's copies; returns or raises when every rank is done."""
        fetches = (self._fetch_on(rank, replace(order, copies=part)) for rank, part in enumerate(copies))
        results = await asyncio.gather(*fetches, return_exceptions=True)
        num_bytes, seconds = 0, 0.0
        for result in results:
            if isinstance(result, BatonError):
                raise result
            if isinstance(result, BaseException):
                raise TransferFailed(f"fetch failed: {result!r}") from result
            num_bytes += result.num_bytes
            seconds = max(seconds, result.seconds)
        return Fetched(num_bytes, seconds)

    async def _fetch_on(self, rank: int, order: FetchBlocks) -> Fetched:
        context = self._context
        if rank == context.spec.rank:
            return await context.agent.fetch(order)
        answer_s = order.timeout_s + 2 * context.spec.transfer.control_timeout_s
        return await context.client.call(context.info.rank_addresses[rank], methods.FETCH_BLOCKS, order, answer_s)

"""Brings the bytes of one announcement to every rank of this replica."""

import asyncio

from core.errors import BatonError, TransferFailed
from core.messages.to_rank import FetchBlocks, Fetched
from decode_worker.handoffs import Fetch
from kv_transfer.plan import plan_copies
from rpc import methods
from worker.rank_context import RankContext


class Fetcher:
    """Plans each rank's copies and has them all done; each rank receives from the source ranks that hold its heads."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    async def fetch(self, fetch: Fetch) -> Fetched:
        """Bytes of all ranks, seconds of the slowest. Raises a BatonError only when no rank writes any more."""
        ranks = range(self._context.info.layout.tensor_parallel)
        results = await asyncio.gather(*(self._fetch_on(rank, fetch) for rank in ranks), return_exceptions=True)
        num_bytes, seconds = 0, 0.0
        for result in results:
            if isinstance(result, BatonError):
                raise result
            if isinstance(result, BaseException):
                raise TransferFailed(f"fetch failed: {result!r}") from result
            num_bytes += result.num_bytes
            seconds = max(seconds, result.seconds)
        return Fetched(num_bytes, seconds)

    async def _fetch_on(self, rank: int, fetch: Fetch) -> Fetched:
        announce, context = fetch.announce, self._context
        timeout_s = context.spec.transfer.data_timeout_s
        copies = plan_copies(
            announce.source.layout,
            context.info.layout,
            rank,
            announce.first_layer,
            announce.num_layers,
            announce.source_blocks,
            fetch.destination_blocks,
        )
        order = FetchBlocks(
            announce.request_id,
            announce.attempt,
            announce.source.rank_addresses,
            announce.source.layout,
            copies,
            timeout_s,
            announce.lease_id,
            announce.first_block,
            announce.source_blocks,
            fetch.due_s,
        )
        if rank == context.spec.rank:
            return await context.agent.fetch(order)
        answer_s = timeout_s + 2 * context.spec.transfer.control_timeout_s
        return await context.client.call(context.info.rank_addresses[rank], methods.FETCH_BLOCKS, order, answer_s)

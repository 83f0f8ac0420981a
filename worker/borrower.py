"""Brings a prefix that another replica has cached into this one's cache, before it would be computed."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from core.block_hash import BlockHash
from core.errors import BatonError
from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import Sequence
from core.messages.to_lender import Borrow, GiveBack, Lent
from core.messages.to_rank import Fetched
from engine.block_pool import OutOfBlocks
from rpc import methods
from worker.fetcher import BlockOrder, Fetcher
from worker.rank_context import RankContext

logger = logging.getLogger(__name__)


class Borrower:
    """One per replica, on its first rank. A prefix that several requests want at a time is fetched once."""

    def __init__(self, context: RankContext, fetcher: Fetcher) -> None:
        self._context = context
        self._fetcher = fetcher
        self._coming: dict[BlockHash, asyncio.Task[Fetched | None]] = {}  # by the first block that is missing
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def borrow(self, name: str, sequence: Sequence, source: ReplicaInfo, due_s: float) -> Fetched | None:
        """Returns when the prefix is cached here, or will not come: what is missing then is computed.

        `name` is unique among the requests and attempts of the fleet. The result is the transfer, if this call made it.
        """
        pool, hashes = self._context.block_pool, sequence.block_hashes
        num_here = len(pool.match(hashes))
        if num_here == len(hashes):
            return None
        first = hashes[num_here]
        known = self._coming.get(first)
        if known is not None:
            await asyncio.shield(known)
            return None
        task = self._spawn(self._fetch(f"{name}~{self._context.info.replica_id}", sequence, num_here, source, due_s))
        self._coming[first] = task
        task.add_done_callback(lambda _: self._coming.pop(first, None))
        return await asyncio.shield(
            task
        )  # whoever asked may leave: blocks are freed when no byte of them is on its way

    async def _fetch(
        self, loan_id: str, sequence: Sequence, num_here: int, source: ReplicaInfo, due_s: float
    ) -> Fetched | None:
        client, timeout_s = self._context.client, self._context.spec.transfer.control_timeout_s
        borrow = Borrow(loan_id, sequence.block_hashes[num_here:], num_here)
        try:
            lent = await client.call(source.address, methods.BORROW, borrow, timeout_s)
            return await self._bring(loan_id, sequence, num_here, lent, due_s) if lent.source_blocks else None
        except (BatonError, OutOfBlocks) as error:
            logger.info("%s lends nothing for %s: %s", source.replica_id, loan_id, error)
            return None
        finally:
            self._spawn(self._give_back(loan_id, source))

    async def _bring(self, loan_id: str, sequence: Sequence, first_block: int, lent: Lent, due_s: float) -> Fetched:
        """Raises BatonError, and OutOfBlocks when there is no room; blocks that came can be found by content."""
        pool, num_layers = self._context.block_pool, self._context.info.layout.num_layers
        blocks = pool.allocate(len(lent.source_blocks))
        pool.begin_write(blocks)
        try:
            order = BlockOrder(
                loan_id, 0, 0, lent.source, 0, num_layers, first_block, lent.source_blocks, tuple(blocks), due_s
            )
            fetched = await self._fetcher.fetch(order)
            for number, block in enumerate(blocks, first_block):
                parent = sequence.block_hashes[number - 1] if number else None
                pool.register(block, sequence.block_hashes[number], parent)
        finally:
            pool.end_write(blocks)
            pool.disown(blocks)
        logger.info("%d blocks of %s came from %s", len(blocks), loan_id, lent.source.replica_id)
        return fetched

    async def _give_back(self, loan_id: str, source: ReplicaInfo) -> None:
        try:
            timeout_s = self._context.spec.transfer.control_timeout_s
            await self._context.client.call(source.address, methods.GIVE_BACK, GiveBack(loan_id), timeout_s)
        except BatonError as error:
            logger.info("%s did not take loan %s back: %s", source.replica_id, loan_id, error)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

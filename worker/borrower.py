"""Brings a prefix that another replica has cached into this one's cache, before it would be computed."""

import asyncio
import logging
from collections.abc import Iterable
from itertools import islice

from core.block_hash import BlockHash, BlockKey, in_group
from core.errors import BatonError
from core.kv_groups import chain_key, deepest_prefix
from core.messages.fleet import ReplicaInfo
from core.messages.to_lender import Borrow, GiveBack, LentBlocks
from core.messages.to_rank import Fetched
from engine.block_pool import OutOfBlocks
from rpc import methods
from worker.arriving import ChainKey, arriving
from worker.fetcher import BlockOrder, Fetcher
from worker.once import Once
from worker.rank_context import RankContext

Hashes = tuple[BlockHash, ...]  # of a prompt's leading blocks

logger = logging.getLogger(__name__)


class Borrower:
    """One per replica, on its first rank. A prefix that several requests want at a time is fetched once."""

    def __init__(self, context: RankContext, fetcher: Fetcher) -> None:
        self._context = context
        self._fetcher = fetcher
        self._coming: Once[BlockKey, Fetched | None] = Once()  # by the first block that is missing
        self._giving_back: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._coming) + len(self._giving_back)

    async def borrow(self, name: str, hashes: Hashes, source: ReplicaInfo, due_s: float) -> Fetched | None:
        """Returns when the prefix is cached here, or will not come: what is missing then is computed.

        `name` is unique among the requests and attempts of the fleet. The result is the transfer, if this call made it.
        """
        layout = self._context.info.layout
        num_here = deepest_prefix(layout.reaches, hashes, self._context.block_pool.__contains__)
        if num_here == len(hashes):
            return None
        borrow = Borrow(self._loan_id(name), hashes[num_here:], num_here)
        return await self._coming.run(hashes[num_here], self._fetch(borrow, hashes, source, due_s))

    async def borrow_blocks(
        self, name: str, hashes: Hashes, group: int, blocks: range, source: ReplicaInfo, due_s: float
    ) -> Fetched | None:
        """As `borrow`, but for these logical blocks of one KV group."""
        keys = [in_group(block_hash, group) for block_hash in hashes[blocks.start : blocks.stop]]
        num_here = len(self._context.block_pool.match(keys))
        if num_here == len(keys):
            return None
        first = blocks.start + num_here
        borrow = Borrow(self._loan_id(f"{name}.{group}"), hashes[first : blocks.stop], first, group)
        return await self._coming.run(keys[num_here], self._fetch(borrow, hashes, source, due_s))

    def _loan_id(self, name: str) -> str:
        return f"{name}~{self._context.info.replica_id}"

    async def _fetch(self, borrow: Borrow, hashes: Hashes, source: ReplicaInfo, due_s: float) -> Fetched | None:
        client, timeout_s = self._context.client, self._context.spec.transfer.control_timeout_s
        try:
            lent = await client.call(source.address, methods.BORROW, borrow, timeout_s)
            if not lent.source_blocks:
                return None
            groups = lent.groups or (LentBlocks(0, borrow.first_block, lent.source_blocks),)
            return await self._bring(borrow.loan_id, hashes, lent.source, groups, due_s)
        except (BatonError, OutOfBlocks) as error:
            logger.info("%s lends nothing for %s: %s", source.replica_id, borrow.loan_id, error)
            return None
        finally:
            task = asyncio.create_task(self._give_back(borrow.loan_id, source))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    async def _bring(
        self, loan_id: str, hashes: Hashes, source: ReplicaInfo, lent: tuple[LentBlocks, ...], due_s: float
    ) -> Fetched:
        """Raises BatonError, and OutOfBlocks when there is no room; blocks that came can be found by content."""
        layout = self._context.info.layout
        groups, before, coming = layout.kv_groups, list[BlockKey](), list[ChainKey]()
        for of_group in lent:
            group, first = groups[of_group.group], of_group.first_block
            needed = range(group.first_needed(first * layout.block_size, layout.block_size), first)
            before += [in_group(hashes[block], of_group.group) for block in needed]
            logical = range(first, first + len(of_group.source_blocks))
            coming += [chain_key(hashes, of_group.group, group, block) for block in logical]
        with arriving(self._context.block_pool, before, coming) as blocks:
            places = iter(blocks)
            fetched = await self._fetch_all(
                BlockOrder(
                    loan_id,
                    0,
                    0,
                    source,
                    0,
                    len(groups[of_group.group].layers),
                    of_group.first_block,
                    of_group.source_blocks,
                    tuple(islice(places, len(of_group.source_blocks))),
                    due_s,
                    of_group.group,
                )
                for of_group in lent
            )
        logger.info("%d blocks of %s came from %s", len(blocks), loan_id, source.replica_id)
        return fetched

    async def _fetch_all(self, orders: Iterable[BlockOrder]) -> Fetched:
        """All at a time; returns or raises when none of them writes any more."""
        results = await asyncio.gather(*map(self._fetcher.fetch, orders), return_exceptions=True)
        total = Fetched(0, 0.0)
        for result in results:
            if isinstance(result, BaseException):
                raise result
            total = Fetched(
                total.num_bytes + result.num_bytes,
                max(total.seconds, result.seconds),
                total.num_digests + result.num_digests,
            )
        return total

    async def _give_back(self, loan_id: str, source: ReplicaInfo) -> None:
        try:
            timeout_s = self._context.spec.transfer.control_timeout_s
            await self._context.client.call(source.address, methods.GIVE_BACK, GiveBack(loan_id), timeout_s)
        except BatonError as error:
            logger.info("%s did not take loan %s back: %s", source.replica_id, loan_id, error)

"""Moves blocks of one replica between its device and the tiers below: down when they are released, up when wanted."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from core.block_hash import BlockHash, BlockKey
from core.errors import BatonError, PeerLost, TransferFailed
from core.kv_groups import deepest_prefix, needed_behind
from core.kv_layout import KVLayout
from core.messages.to_rank import TierMove
from core.messages.to_scheduler import TierStatus
from engine.block_pool import BlockPool, OutOfBlocks
from engine.kv_tiers import DEVICE, KVTiers
from worker.arriving import ChainKey, arriving
from worker.once import Once
from worker.rates import MovingAverage
from worker.tier_stores import MOST_BLOCKS

logger = logging.getLogger(__name__)

INTERVAL_S = 0.02

MakeMove = Callable[[TierMove], Awaitable[None]]  # on all ranks; raises BatonError


@dataclass
class _Counts:
    num_wanted: int = 0
    num_found: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    restore_bytes_per_s: MovingAverage = field(default_factory=MovingAverage)


class Tiers:
    """One per replica, on its first rank; belongs to one event loop."""

    def __init__(
        self, pool: BlockPool, books: KVTiers, names: Sequence[str], layout: KVLayout, make_move: MakeMove
    ) -> None:
        """`names` of the tiers below the device."""
        self.books = books
        self._pool = pool
        self._names = ("device", *names)
        self._layout = layout
        self._block_bytes = layout.block_bytes_per_rank * layout.num_ranks
        self._make_move = make_move
        self._spilling = asyncio.Lock()
        self._lost = asyncio.Event()
        self._restoring: Once[BlockKey, None] = Once()
        self._counts = [_Counts() for _ in self._names]

    def __len__(self) -> int:
        return len(self._restoring)

    async def run(self) -> None:
        """Spills what was released, until cancelled. Raises PeerLost when a rank does not answer."""
        spilling = asyncio.create_task(self._spill_forever())
        try:
            await self._lost.wait()
            raise PeerLost("a rank does not answer")
        finally:
            spilling.cancel()

    async def restore(self, hashes: Sequence[BlockHash]) -> None:
        """Returns when the longest prefix that this replica has in any tier is on its device, or will not come.

        Who asks is about to take blocks: what these would push off the device is below it by then.
        """
        if self._pool.num_empty < len(hashes) * len(self._layout.kv_groups):
            await self._spill_all()
        pool, books, layout = self._pool, self.books, self._layout
        depth = deepest_prefix(layout.reaches, hashes, lambda key: key in pool or books.holds(key))
        needed = needed_behind(layout.kv_groups, hashes, depth, layout.block_size)
        missing = [chain_key for chain_key in needed if chain_key[0] not in pool]
        below = books.tiers_of([key for key, _ in missing])
        num_wanted = len(needed_behind(layout.kv_groups, hashes, len(hashes), layout.block_size))
        self._count_found([DEVICE] * (len(needed) - len(missing)) + below, num_wanted)
        if missing:
            await self._restoring.run(missing[0][0], self._restore([key for key, _ in needed], missing))

    def statuses(self) -> tuple[TierStatus, ...]:
        """Of the device and each tier below."""
        sizes = [(self._pool.num_blocks, self._pool.num_cached)]
        sizes += [(tier.num_slots, len(tier.held)) for tier in self.books.tiers]
        return tuple(
            TierStatus(
                name,
                *size,
                counts.num_wanted,
                counts.num_found,
                counts.bytes_in,
                counts.bytes_out,
                counts.restore_bytes_per_s.value,
            )
            for name, size, counts in zip(self._names, sizes, self._counts, strict=True)
        )

    # ---- inside -------------------------------------------------------------------------------------------------

    async def _restore(self, needed: Sequence[BlockKey], missing: Sequence[ChainKey]) -> None:
        found = self.books.begin_restore([key for key, _ in missing], time.monotonic())
        try:
            with arriving(self._pool, needed, missing[: len(found.keys)]) as blocks:
                await self._move(found.moves_to(blocks))
        except (TransferFailed, OutOfBlocks) as error:
            logger.info("%d blocks stay below the device: %s", len(found.keys), error)
        finally:
            self.books.end_restore(found)

    async def _spill_forever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._spill_all()
            self.books.expire(time.monotonic())

    async def _spill_all(self) -> None:
        async with self._spilling:
            while await self._spill_some():
                pass

    async def _spill_some(self) -> bool:
        """Whether there may be more."""
        released = self._pool.take_released(min(MOST_BLOCKS, self._pool.num_free // 4))
        spill = self.books.spill(released, time.monotonic())
        if spill is not None:
            self._pool.begin_read_cached(spill.blocks)
            try:
                await self._move(spill.moves)
                self.books.spilled(spill)
            except TransferFailed as error:
                logger.warning("%d blocks were not kept below the device: %s", len(spill.blocks), error)
                self.books.spill_failed(spill)
            finally:
                self._pool.end_read(spill.blocks)
        return bool(released)

    def _count_found(self, tiers: Sequence[int], num_wanted: int) -> None:
        for number, counts in enumerate(self._counts):
            num_found = tiers.count(number)
            counts.num_wanted += num_wanted
            counts.num_found += num_found
            num_wanted -= num_found

    async def _move(self, moves: Sequence[TierMove]) -> None:
        """In parts, so that others take turns. Raises TransferFailed: then no rank touches a block any more."""
        for move in moves:
            for first in range(0, len(move.source_slots), MOST_BLOCKS):
                part = slice(first, first + MOST_BLOCKS)
                slots = move.source_slots[part], move.destination_slots[part]
                begun_at = time.monotonic()
                await self._make(TierMove(move.source, move.destination, *slots))
                num_bytes = len(slots[0]) * self._block_bytes
                if move.destination == DEVICE:
                    rate = num_bytes / max(time.monotonic() - begun_at, 1e-6)
                    self._counts[move.source].restore_bytes_per_s.add(rate)
                self._counts[move.source].bytes_out += num_bytes
                self._counts[move.destination].bytes_in += num_bytes

    async def _make(self, move: TierMove) -> None:
        try:
            await self._make_move(move)
        except TransferFailed:
            raise
        except BatonError as error:  # a rank gave no answer and may still write: its blocks stay held until the end
            self._lost.set()
            logger.error("a rank moves no blocks: %s", error)
            await asyncio.get_running_loop().create_future()

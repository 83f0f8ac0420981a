"""Keeps the channels of one rank within its memory: closes idle ones when another is wanted."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress

from core.errors import TransferFailed
from kv_transfer.pair_book import PairBook

Close = Callable[[], Awaitable[object]]


class Pairs:
    """Belongs to one event loop. Keys name a channel's direction and peer."""

    def __init__(self, budget_bytes: int, idle_timeout_s: float, fresh_s: float) -> None:
        self.book = PairBook(budget_bytes, idle_timeout_s, fresh_s)
        self._closes: dict[Hashable, Close] = {}
        self._changed = asyncio.Event()

    def __contains__(self, key: Hashable) -> bool:
        """False from the moment on that a channel is chosen to make room."""
        return key in self.book

    async def open(self, key: Hashable, num_bytes: int, close: Close, timeout_s: float) -> None:
        """Returns when there is room, after closing what had to go; `close` will end this one in its turn.

        Raises TransferFailed when all others are busy until `timeout_s`, or the budget holds not even one.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._make_room(num_bytes)
        except TimeoutError as error:
            raise TransferFailed(
                f"no room for a channel of {num_bytes >> 20} MiB beside {len(self.book)} others in transfer.pairs_mib "
                f"{self.book.budget_bytes >> 20}",
                field="pairs_mib",
            ) from error
        self.book.open(key, num_bytes, time.monotonic())
        self._closes[key] = close

    def use(self, key: Hashable) -> None:
        """A slab is on its way."""
        self.book.use(key)

    def rest(self, key: Hashable) -> None:
        """A slab is over."""
        self.book.rest(key, time.monotonic())
        self._changed.set()

    def forget(self, key: Hashable) -> None:
        """A channel has ended. Idempotent."""
        self.book.close(key)
        self._closes.pop(key, None)
        self._changed.set()

    async def _make_room(self, wanted_bytes: int) -> None:
        while True:
            self._changed.clear()
            victims = self.book.victims(wanted_bytes, time.monotonic())
            closes = [self._closes.pop(key) for key in victims]
            for key in victims:
                self.book.close(key)
            await asyncio.gather(*(close() for close in closes))
            if self.book.fits(wanted_bytes):
                return
            with suppress(TimeoutError):  # a fresh one ages without telling
                await asyncio.wait_for(self._changed.wait(), self.book.fresh_s)

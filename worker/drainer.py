"""Carries a Drain out: looks at what a role holds whenever something of it may have ended, and at the deadlines."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from worker.drain import Drain, DrainOrder, Held

logger = logging.getLogger(__name__)


class Drainer:
    """One per role service. Belongs to one event loop."""

    def __init__(self, grace_s: float, held: Callable[[], Held], hand_over: Callable[[], None]) -> None:
        """`hand_over` has every request that is left go on elsewhere; it is called once at most."""
        self._drain = Drain(grace_s)
        self._held = held
        self._hand_over = hand_over
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def is_draining(self) -> bool:
        """Whether new work is to be refused."""
        return not self._drain.takes_work

    @property
    def is_drained(self) -> bool:
        """Whether the replica may die."""
        return self._drained.is_set()

    def changed(self) -> None:
        """Something that was held may have ended."""
        self._changed.set()

    async def until_drained(self) -> None:
        """Returns when the replica may die; does not begin a drain."""
        await self._drained.wait()

    async def drain(self, timeout_s: float) -> None:
        """Returns when drained. Repeatable: the earliest deadline holds. A caller that is lost does not stop it."""
        self._drain.start(time.monotonic(), timeout_s)
        self.changed()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        await asyncio.shield(self._running)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            held = self._held()
            order = self._drain.advance(held, time.monotonic())
            if order is DrainOrder.END:
                if held:
                    logger.warning("drained, though %d moving things came to no rest", held.num_moving)
                else:
                    logger.info("drained, nothing is held")
                self._drained.set()
                return
            if order is DrainOrder.HAND_OVER:
                logger.info("handing %d requests over", held.num_requests)
                self._hand_over()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._drain.wake_at - time.monotonic()):
                    await self._changed.wait()

"""One fetch order while it runs: its landing, and how it comes to rest."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from kv_transfer.channels.protocol import Landing

T = TypeVar("T")


@dataclass(eq=False)
class Transfer:
    """What all slabs of one order have in common."""

    request_id: str
    attempt: int
    lease_id: int = 0
    due: float = 0.0  # on the event loop's monotonic clock
    group: int = 0  # of KV
    landing: Landing = field(default_factory=Landing)

    async def come_to_rest(self) -> None:
        """Revokes the landing; on return, or when it raises CancelledError, no destination byte will be written."""
        quiet = self.landing.revoke()
        if not quiet.done():
            await finish(asyncio.wrap_future(quiet))


async def finish(awaitable: Awaitable[T]) -> T:
    """Awaits to the end even when cancelled meanwhile, then raises CancelledError. Only for what ends by itself."""
    task = asyncio.ensure_future(awaitable)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return task.result()


def drop_result(done: "asyncio.Future[T]") -> None:
    """Done-callback for work whose outcome nobody may be waiting for."""
    if not done.cancelled():
        done.exception()


def when_done(future: "Future[T]", tell: "Callable[[Future[T]], object]") -> None:
    """Tells in the running loop that a channel's future is done; the loop need not be woken when it is already."""
    loop = asyncio.get_running_loop()
    if future.done():
        loop.call_soon(tell, future)
    else:
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(tell, done))

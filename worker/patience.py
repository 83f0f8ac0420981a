"""Waiting for work that need not be done: it goes on when nobody waits for it any more."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def wait_for_at_most(seconds: float, work: Coroutine[Any, Any, None], under_way: set[asyncio.Task[None]]) -> None:
    """Returns when the work is over, or after so many seconds; 0: not before it is over. Raises what ended it.

    Until then it stands in `under_way`, which must outlive it.
    """
    task = asyncio.create_task(work)
    under_way.add(task)
    task.add_done_callback(under_way.discard)
    await asyncio.wait({task}, timeout=seconds or None)
    if task.done():
        task.result()

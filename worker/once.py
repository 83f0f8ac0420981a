"""The same work wanted by several at a time is done once."""

import asyncio
from collections.abc import Coroutine, Hashable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Once(Generic[Key, Result]):
    """Belongs to one event loop. Work goes on when those who asked for it have left."""

    def __init__(self) -> None:
        self._running: dict[Key, asyncio.Task[Result]] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def run(self, key: Key, work: Coroutine[Any, Any, Result]) -> Result | None:
        """Returns when the work under this key is over: its result to the first who asked, None to others."""
        known = self._running.get(key)
        if known is not None:
            work.close()
            await asyncio.shield(known)
            return None
        task = self._running[key] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._running.pop(key))
        return await asyncio.shield(task)

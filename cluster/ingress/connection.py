"""The client's connection: reading a bounded body, and noticing that the client left."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from cluster.ingress.errors import ClientDisconnected
from core.config import IngressConfig
from core.errors import BodyTooLarge, BodyTooSlow

Result = TypeVar("Result")


async def read_body(request: Request, config: IngressConfig) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it exceeds the limit, announced or not, and BodyTooSlow."""
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _pieces(request, int(config.max_body_mib * 2**20))
    except TimeoutError as error:
        raise BodyTooSlow(f"the body did not arrive within {config.body_timeout_s:g} s") from error


async def _pieces(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(f"the body has {announced} bytes; at most {limit} are allowed")
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise BodyTooLarge(f"the body has more than the {limit} bytes that are allowed")
        pieces.append(piece)
    return b"".join(pieces)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work` while the client stays. Raises ClientDisconnected, after `work` was cancelled and has ended."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        watcher.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

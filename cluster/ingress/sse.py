"""Server-sent events: cheap frames, and a response that ends its generator whatever happens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.ingress.connection import until_disconnect
from cluster.ingress.errors import CLIENT_CLOSED_REQUEST, ClientDisconnected, at_the_edge, error_body, status_of
from cluster.ingress.request_scope import RequestRecord

DONE = b"data: [DONE]\n\n"
_LAST_WORDS_S = 1.0  # for telling a client of an error when its connection may be clogged

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def frame(content: Mapping[str, Any]) -> bytes:
    """One event."""
    return f"data: {_encode(content)}\n\n".encode()


class ChunkWriter:
    """Writes the chunks of one answer; what they have in common is encoded once."""

    def __init__(self, common: Mapping[str, Any]) -> None:
        self._head = f"data: {_encode(common)[:-1]},"

    def write(self, fields: Mapping[str, Any]) -> bytes:
        """A chunk of the common fields followed by `fields`, of which there must be one."""
        return f"{self._head}{_encode(fields)[1:]}\n\n".encode()


class EventStream(Response):
    """Sends frames as they come, each only when the client has taken the one before.

    The status line waits for the first frame, so that an error before it is a plain HTTP error. A later one is an
    event of its own and ends the stream. When the client leaves, `frames` is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], timeout_s: float, record: RequestRecord) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._timeout_s = timeout_s
        self._record = record
        self._started = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Raises the first frame's error if there is one, nothing after that."""
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientDisconnected:
            self._record.status = CLIENT_CLOSED_REQUEST

    async def _send_all(self, send: Send) -> None:
        try:
            async with aclosing(self._frames) as frames, asyncio.timeout(self._timeout_s):
                async for content in frames:
                    await self._send(send, content)
        except Exception as error:
            known = at_the_edge(error, self._timeout_s)
            if not self._started:
                raise known from error
            self._record.status = status_of(known)
            await self._last_words(send, frame(error_body(known)))
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, content: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": content, "more_body": True})

    async def _last_words(self, send: Send, content: bytes) -> None:
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await send({"type": "http.response.body", "body": content, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return  # the client does not read; the server closes the connection

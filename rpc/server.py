"""The server shell: binds methods to coroutines, checks the secret, carries errors of the tree to the caller."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from core.errors import BatonError, Unauthorized
from rpc.codec import decode, encode, encode_error
from rpc.methods import ServerStream, Unary

logger = logging.getLogger(__name__)

SERVICE = "baton"
SECRET_KEY = "baton-secret"
ERROR_KEY = "baton-error-bin"

Request = TypeVar("Request")
Response = TypeVar("Response")

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]


class RpcServer:
    """One listening port with its handlers. `listen`, register handlers, `start`."""

    def __init__(self, host: str, secret: str) -> None:
        self._host = host
        self._secret = secret
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def unary(self, method: Unary[Request, Response], handler: Callable[[Request], Awaitable[Response]]) -> None:
        """A lost or cancelled call cancels `handler`'s task."""

        async def serve(data: bytes, context: Any) -> bytes:
            self._authorize(context)
            try:
                return encode(await handler(decode(method.request, data)))
            except BatonError as error:
                await _abort(context, error)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("%s failed", method.name)
                await _abort(context, BatonError(f"{method.name}: {error}"))
            raise AssertionError("abort() does not return")

        self._handlers[method.name] = grpc.unary_unary_rpc_method_handler(self._guarded(serve))

    def stream(
        self, method: ServerStream[Request, Response], handler: Callable[[Request], AsyncIterator[Response]]
    ) -> None:
        """A lost call closes `handler`'s generator."""

        async def serve(data: bytes, context: Any) -> AsyncIterator[bytes]:
            try:
                self._authorize(context)
                async for message in handler(decode(method.request, data)):
                    yield encode(message)
            except BatonError as error:
                await _abort(context, error)
            except Exception as error:
                logger.exception("%s failed", method.name)
                await _abort(context, BatonError(f"{method.name}: {error}"))

        self._handlers[method.name] = grpc.unary_stream_rpc_method_handler(serve)

    def listen(self, port: int = 0) -> int:
        """Takes the port, so that it can be told to others before serving; returns it. Raises OSError."""
        try:
            return int(self._server.add_insecure_port(f"{self._host}:{port}"))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._host}:{port}") from error

    async def start(self) -> None:
        """Begins to answer. Handlers must be registered by now."""
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers),))
        await self._server.start()

    async def stop(self, grace_s: float = 0.2) -> None:
        """Ends open calls after `grace_s` and closes the port."""
        await self._server.stop(grace_s)

    def _authorize(self, context: Any) -> None:
        if not self._secret:
            return
        given = dict(context.invocation_metadata()).get(SECRET_KEY, "")
        if not hmac.compare_digest(str(given).encode(), self._secret.encode()):
            raise Unauthorized("the cluster secret is missing or wrong")

    def _guarded(self, serve: Callable[[bytes, Any], Awaitable[bytes]]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def guarded(data: bytes, context: Any) -> bytes:
            try:
                self._authorize(context)
            except BatonError as error:
                await _abort(context, error)
            return await serve(data, context)

        return guarded


async def _abort(context: Any, error: BatonError) -> None:
    metadata = ((ERROR_KEY, encode_error(error)),)
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message[:1024], metadata)

"""The server shell: binds methods to coroutines, checks secret and protocol, carries errors to the caller."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from core.errors import BatonError, Incompatible, Unauthorized
from core.security import Security
from rpc.codec import decode, encode, encode_error
from rpc.methods import ServerStream, Unary
from rpc.protocol import OURS, PROTOCOL_KEY, Protocols, parse_protocols
from rpc.tls import server_credentials

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

    def __init__(self, host: str, security: Security, protocols: Protocols = OURS) -> None:
        """Raises ConfigurationError when `host` asks for a secret, or naming a bad file of `cluster.tls`."""
        security.check(host)
        self._host = host
        self._secret = security.secret
        self._credentials = server_credentials(security.tls) if security.tls.is_on else None
        self._protocols = protocols
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def unary(self, method: Unary[Request, Response], handler: Callable[[Request], Awaitable[Response]]) -> None:
        """A lost or cancelled call cancels `handler`'s task."""

        async def serve(data: bytes, context: Any) -> bytes:
            try:
                self._admit(context)
                answer = encode(await handler(decode(method.request, data)))
            except BatonError as error:
                await self._abort(context, error)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("%s failed", method.name)
                await self._abort(context, BatonError(f"{method.name}: {error}"))
            context.set_trailing_metadata(self._greeting())
            return answer

        self._handlers[method.name] = grpc.unary_unary_rpc_method_handler(serve)

    def stream(
        self, method: ServerStream[Request, Response], handler: Callable[[Request], AsyncIterator[Response]]
    ) -> None:
        """A lost call closes `handler`'s generator."""

        async def serve(data: bytes, context: Any) -> AsyncIterator[bytes]:
            try:
                self._admit(context)
                await context.send_initial_metadata(self._greeting())
                async for message in handler(decode(method.request, data)):
                    yield encode(message)
            except BatonError as error:
                await self._abort(context, error)
            except Exception as error:
                logger.exception("%s failed", method.name)
                await self._abort(context, BatonError(f"{method.name}: {error}"))

        self._handlers[method.name] = grpc.unary_stream_rpc_method_handler(serve)

    def listen(self, port: int = 0) -> int:
        """Takes the port, so that it can be told to others before serving; returns it. Raises OSError."""
        try:
            address = f"{self._host}:{port}"
            if self._credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, self._credentials))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._host}:{port}") from error

    async def start(self) -> None:
        """Begins to answer. Handlers must be registered by now."""
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers),))
        await self._server.start()

    async def stop(self, grace_s: float = 0.2) -> None:
        """Ends open calls after `grace_s` and closes the port."""
        await self._server.stop(grace_s)

    def _admit(self, context: Any) -> None:
        """Nothing of a call is decoded before. Raises Unauthorized, Incompatible."""
        given = dict(context.invocation_metadata())
        if self._secret and not hmac.compare_digest(str(given.get(SECRET_KEY, "")).encode(), self._secret.encode()):
            raise Unauthorized("the cluster secret is missing or wrong")
        theirs = parse_protocols(given.get(PROTOCOL_KEY))
        if not self._protocols.overlap(theirs):
            raise Incompatible(f"the caller speaks {theirs}, {self._host} {self._protocols}", field=PROTOCOL_KEY)

    def _greeting(self) -> tuple[tuple[str, str | bytes], ...]:
        return ((PROTOCOL_KEY, self._protocols.header),)

    async def _abort(self, context: Any, error: BatonError) -> NoReturn:
        metadata = (*self._greeting(), (ERROR_KEY, encode_error(error)))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message[:1024], metadata)
        raise AssertionError("abort() does not return")

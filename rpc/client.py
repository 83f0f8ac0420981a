"""The client shell: one connection per address, a deadline on every call, foreign errors translated here."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import grpc
import grpc.aio

from core.errors import BatonError, Incompatible, PeerLost
from core.security import Security
from rpc.codec import decode, decode_error, encode
from rpc.methods import ServerStream, Unary
from rpc.protocol import OURS, PROTOCOL_KEY, Protocols, parse_protocols
from rpc.server import ERROR_KEY, SECRET_KEY, SERVICE
from rpc.tls import channel_credentials, name_option, why_refused

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

CLIENT_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # this and not the line above ends a call to a frozen peer; default a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class RpcClient:
    """Calls any address; connections are made on first use and kept. Belongs to one event loop."""

    def __init__(self, security: Security, protocols: Protocols = OURS) -> None:
        """Raises ConfigurationError naming a file of `cluster.tls` that cannot be used."""
        self._tls = security.tls
        self._credentials = channel_credentials(security.tls) if security.tls.is_on else None
        self._protocols = protocols
        secret = security.secret
        self._metadata = ((PROTOCOL_KEY, protocols.header), *(((SECRET_KEY, secret),) if secret else ()))
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._greetings: dict[str, str | None] = {}  # address -> the last PROTOCOL_KEY that came from there

    async def call(
        self, address: str, method: Unary[Request, Response], request: Request, timeout_s: float
    ) -> Response:
        """Raises the callee's BatonError, or PeerLost when it cannot be reached or does not answer in time.

        Raises Incompatible when callee and caller have no version of the protocol in common.
        """
        invoke = self._channel(address).unary_unary(f"/{SERVICE}/{method.name}")
        call = invoke(encode(request), timeout=timeout_s, metadata=self._metadata)
        try:
            data = await call
            self._greet(address, await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, address, method.name) from error
        except asyncio.CancelledError:
            _require_cancelled(address, method.name)
            raise
        return decode(method.response, data)

    async def stream(
        self, address: str, method: ServerStream[Request, Response], request: Request
    ) -> AsyncGenerator[Response, None]:
        """Yields responses until the callee ends the stream. Raises like `call`; a dead peer shows by keepalive."""
        invoke = self._channel(address).unary_stream(f"/{SERVICE}/{method.name}")
        call = invoke(encode(request), metadata=self._metadata)
        try:
            greeted = False
            async for data in call:
                if not greeted:
                    self._greet(address, await call.initial_metadata())
                    greeted = True
                yield decode(method.response, data)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, address, method.name) from error
        except asyncio.CancelledError:
            _require_cancelled(address, method.name)
            raise
        finally:
            call.cancel()

    async def forget(self, address: str) -> None:
        """Closes the connection to a peer that is gone; calls in flight on it fail."""
        self._greetings.pop(address, None)
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Closes every connection."""
        await asyncio.gather(*self._closing)
        for address in list(self._channels):
            await self.forget(address)

    @property
    def addresses(self) -> frozenset[str]:
        """Those that a connection is kept for."""
        return frozenset(self._channels)

    def _channel(self, address: str) -> Any:
        """Each new connection makes those be forgotten that fail to connect: no call is in flight on them."""
        if address not in self._channels:
            for other, channel in list(self._channels.items()):
                if channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    closing = asyncio.create_task(self.forget(other))
                    self._closing.add(closing)
                    closing.add_done_callback(self._closing.discard)
            self._channels[address] = self._open(address)
        return self._channels[address]

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=[*CLIENT_OPTIONS, name_option(self._tls)])

    def _greet(self, address: str, metadata: Any) -> None:
        """Reads which protocols an answer's sender speaks; logs skew once. Raises Incompatible before it is decoded."""
        header = metadata.get(PROTOCOL_KEY)
        if address in self._greetings and self._greetings[address] == header:
            return
        theirs = parse_protocols(header)
        if not self._protocols.overlap(theirs):
            raise Incompatible(f"{address} speaks {theirs}, we {self._protocols}", field=PROTOCOL_KEY)
        if theirs != self._protocols:
            logger.info("%s speaks %s, we %s", address, theirs, self._protocols)
        self._greetings[address] = header

    def _translate(self, error: grpc.aio.AioRpcError, address: str, name: str) -> BatonError:
        """Raises Incompatible when the error comes from a peer whose words we may misread."""
        metadata = error.trailing_metadata()
        if metadata is not None and ERROR_KEY in metadata:
            self._greet(address, metadata)
            return decode_error(metadata[ERROR_KEY])
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return PeerLost(f"{address} did not answer {name} in time")
        details = error.details() or ""
        why = why_refused(details, self._tls) or f"{error.code().name} {details}"
        return PeerLost(f"{address} is lost during {name}: {why}")


def _require_cancelled(address: str, name: str) -> None:
    """A closed connection cancels its calls; only our own task's cancellation may look like one to the caller."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise PeerLost(f"the connection to {address} was closed during {name}")

"""Two processes of different releases on a real port: what is refused, by whom, and what is logged."""

import json
import logging
from base64 import b64decode
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from core.errors import Incompatible, InvalidParameter, Overloaded
from core.kv_layout import Compatibility
from core.messages.fleet import Acknowledged, Empty
from core.messages.to_decode import Cancel, TokenFrame, TokensFrom
from core.security import UNGUARDED
from core.version import OLDEST_PROTOCOL, PROTOCOL
from rpc.client import RpcClient
from rpc.codec import decode, decode_error, encode, encode_error
from rpc.methods import CANCEL, TOKENS, Unary
from rpc.protocol import FIRST, OURS, PROTOCOL_KEY, Protocols, parse_protocols
from rpc.server import ERROR_KEY, SERVICE, RpcServer

SECOND = Protocols(2, 1)
THIRD = Protocols(3, 3)  # has left protocol 1 behind
OLD = json.loads((Path(__file__).parent / "protocol_1.json").read_text())["methods"]


class Peer:
    """Answers Cancel and Tokens, and counts."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def cancel(self, message: Cancel) -> Acknowledged:
        self.num_calls += 1
        if message.request_id == "full":
            raise Overloaded("the queue is full")
        return Acknowledged()

    async def tokens(self, message: TokensFrom):
        self.num_calls += 1
        for sequence in range(3):
            yield TokenFrame(sequence, ())


@asynccontextmanager
async def serving(protocols: Protocols):
    peer, server = Peer(), RpcServer("127.0.0.1", UNGUARDED, protocols)
    server.unary(CANCEL, peer.cancel)
    server.stream(TOKENS, peer.tokens)
    address = f"127.0.0.1:{server.listen()}"
    await server.start()
    try:
        yield peer, address
    finally:
        await server.stop()


@asynccontextmanager
async def serving_protocol_1():
    """A server as protocol 1 had it: it looks for no version, sends none, and answers with frames of that time."""

    async def cancel(data: bytes, context) -> bytes:
        if decode(Cancel, data).request_id == "full":
            error = encode_error(Overloaded("the queue is full"))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "", ((ERROR_KEY, error),))
        return b64decode(OLD["Cancel"]["response_frames"][1])

    async def tokens(data: bytes, context):
        for frame in OLD["Tokens"]["response_frames"]:
            yield b64decode(frame)

    handlers = {
        "Cancel": grpc.unary_unary_rpc_method_handler(cancel),
        "Tokens": grpc.unary_stream_rpc_method_handler(tokens),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def calling(protocols: Protocols):
    client = RpcClient(UNGUARDED, protocols)
    try:
        yield client
    finally:
        await client.close()


async def frames_of(client: RpcClient, address: str) -> list[int]:
    return [frame.sequence async for frame in client.stream(address, TOKENS, TokensFrom("i"))]


async def raw_answer(address: str, name: str, data: bytes, metadata) -> bytes:
    """As a caller that reads no version from the answer. Raises AioRpcError."""
    async with grpc.aio.insecure_channel(address) as channel:
        return await channel.unary_unary(f"/{SERVICE}/{name}")(data, metadata=metadata, timeout=5)


async def test_equals_and_neighbours_understand_each_other_and_skew_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "rpc.client")
    async with serving(SECOND) as (_, address), calling(SECOND) as client:
        assert await client.call(address, CANCEL, Cancel("r", 1), 5) == Acknowledged()
        assert await frames_of(client, address) == [0, 1, 2]
        assert not caplog.messages
    async with serving(SECOND) as (_, address), calling(Protocols(3, 2)) as client:
        for _ in range(2):
            assert await client.call(address, CANCEL, Cancel("r", 1), 5) == Acknowledged()
            assert await frames_of(client, address) == [0, 1, 2]
        assert caplog.messages == [f"{address} speaks protocols 1 to 2, we protocols 2 to 3"]


async def test_a_server_refuses_a_caller_of_another_age_before_it_decodes():
    not_decodable = Unary("Cancel", Empty, Acknowledged)
    async with serving(SECOND) as (peer, address):
        async with calling(SECOND) as client:
            with pytest.raises(InvalidParameter):
                await client.call(address, not_decodable, Empty(), 5)
        async with calling(THIRD) as client:
            with pytest.raises(Incompatible, match=f"{address} speaks protocols 1 to 2, we protocol 3"):
                await client.call(address, not_decodable, Empty(), 5)
            with pytest.raises(Incompatible, match="protocols 1 to 2, we protocol 3"):
                await frames_of(client, address)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw_answer(address, "Cancel", b"", ((PROTOCOL_KEY, "3,3"),))
        trailer = caught.value.trailing_metadata()
        assert trailer[PROTOCOL_KEY] == "2,1"
        refusal = decode_error(trailer[ERROR_KEY])
        assert isinstance(refusal, Incompatible) and refusal.field == PROTOCOL_KEY and not refusal.retryable
        assert refusal.message == "the caller speaks protocol 3, 127.0.0.1 protocols 1 to 2"
        assert peer.num_calls == 0


async def test_a_caller_without_a_version_speaks_protocol_1():
    request = b64decode(OLD["Cancel"]["request_frames"][0])
    async with serving(SECOND) as (peer, address):
        assert decode(Acknowledged, await raw_answer(address, "Cancel", request, ())) == Acknowledged()
    async with serving(Protocols(3, 2)) as (peer, address):
        with pytest.raises(grpc.aio.AioRpcError, match="the caller speaks protocol 1, "):
            await raw_answer(address, "Cancel", request, ())
        assert peer.num_calls == 0


async def test_a_server_of_protocol_1_is_understood_today_and_its_age_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "rpc.client")
    async with serving_protocol_1() as address, calling(SECOND) as client:
        assert await client.call(address, CANCEL, Cancel("r", 1), 5) == Acknowledged(known=False)
        assert await frames_of(client, address) == [2, 1]
        with pytest.raises(Overloaded):
            await client.call(address, CANCEL, Cancel("full", 1), 5)
        assert caplog.messages == [f"{address} speaks protocol 1, we protocols 1 to 2"]


async def test_a_server_of_protocol_1_is_refused_by_a_caller_that_has_left_it_behind():
    async with serving_protocol_1() as address, calling(THIRD) as client:
        refused = f"{address} speaks protocol 1, we protocol 3"
        with pytest.raises(Incompatible, match=refused):
            await client.call(address, CANCEL, Cancel("r", 1), 5)
        with pytest.raises(Incompatible, match=refused):
            await frames_of(client, address)
        with pytest.raises(Incompatible, match=refused):
            await client.call(address, CANCEL, Cancel("full", 1), 5)


def test_ranges_overlap_or_not_and_a_header_is_read_back():
    assert (OURS.newest, OURS.oldest) == (PROTOCOL, OLDEST_PROTOCOL)
    assert SECOND.header == "2,1" and parse_protocols("2,1") == SECOND
    assert parse_protocols(None) == FIRST == Protocols(1, 1)
    assert SECOND.overlap(FIRST) and FIRST.overlap(SECOND) and SECOND.overlap(Protocols(3, 2))
    assert not SECOND.overlap(THIRD) and not THIRD.overlap(SECOND) and not Protocols(3, 2).overlap(FIRST)
    for header in ("", "2", "two,one", "2,-1", "2,1,0"):
        with pytest.raises(Incompatible, match="NEWEST,OLDEST"):
            parse_protocols(header)


def test_kv_transfer_between_releases_is_judged_by_its_own_version():
    """A pair of an old and a new replica exchanges KV as long as that has not changed, whatever the messages did."""
    old = decode(Compatibility, encode(Compatibility("m", "r", "float32", 16, "h", 1)))
    Compatibility("m", "r", "float32", 16, "h", 1).require_equal(old)
    with pytest.raises(Incompatible, match="protocol_version differs: 3 here, 1 there"):
        Compatibility("m", "r", "float32", 16, "h").require_equal(old)

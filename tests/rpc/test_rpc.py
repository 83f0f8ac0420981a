"""Calls over a real port: messages round-trip, errors keep their class, losses become PeerLost, cancels arrive."""

import asyncio
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from core.errors import Overloaded, PeerLost, Unauthorized
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged, ReplicaInfo, Role
from core.messages.to_decode import Cancel, Open, Sequence, Ticket, TokenEvent, TokenFrame, TokensFrom
from core.sampling import SamplingParams, TokenLogprobs
from core.security import UNGUARDED, Security
from rpc.client import RpcClient
from rpc.codec import decode, encode
from rpc.methods import CANCEL, OPEN, TOKENS
from rpc.server import RpcServer

REPLICA = ReplicaInfo(
    "d0", Role.DECODE, 7, ("127.0.0.1:1",), KVLayout(2, 4, 8, 16, "float32", 2),
    Compatibility("m", "r", "float32", 16, "h"), 64, 8, 256, 512,
)  # fmt: skip
SEQUENCE = Sequence(
    (1, 2, 3), (b"\x00\xff" * 8,), SamplingParams(8, stop_token_ids=frozenset({2, 5}), num_logprobs=1), b"root"
)


@pytest.mark.parametrize(
    "message",
    [
        Open("r", 1, "i", SEQUENCE, REPLICA, 2.5),
        Open("r", 1, "i", SEQUENCE, None, 2.5),
        TokenFrame(3, (TokenEvent("r", 0, 4, (9,), (TokenLogprobs(-0.5, ((1, -0.5),)),), "stop"),)),
    ],
)
def test_messages_round_trip(message):
    assert decode(type(message), encode(message)) == message


def test_a_newer_peers_extra_field_is_ignored():
    import msgpack

    data = msgpack.packb({"request_id": "r", "attempt": 1, "colour": "red"})
    assert decode(Cancel, data) == Cancel("r", 1)


@asynccontextmanager
async def serving(secret: str = "", client_secret: str = "", **handlers):
    server = RpcServer("127.0.0.1", Security(secret))
    for method, handler in ((CANCEL, handlers.get("cancel")), (OPEN, handlers.get("open"))):
        if handler:
            server.unary(method, handler)
    if "tokens" in handlers:
        server.stream(TOKENS, handlers["tokens"])
    port = server.listen()
    await server.start()
    client = RpcClient(Security(client_secret))
    try:
        yield server, client, f"127.0.0.1:{port}"
    finally:
        await client.close()
        await server.stop()


async def test_an_answer_and_an_error_arrive_as_they_were():
    async def open_(message: Open) -> Ticket:
        if message.request_id == "full":
            raise Overloaded("queue is full", retry_after_s=1.5)
        return Ticket(message.request_id, message.attempt, 11, REPLICA, 0, 1)

    async with serving(open=open_) as (_, client, address):
        ticket = await client.call(address, OPEN, Open("r", 1, "i", SEQUENCE, None, 1), 5)
        assert ticket.lease_id == 11 and ticket.decode == REPLICA
        with pytest.raises(Overloaded, match="queue is full") as caught:
            await client.call(address, OPEN, Open("full", 1, "i", SEQUENCE, None, 1), 5)
        assert caught.value.retry_after_s == 1.5


async def test_a_wrong_secret_is_refused_on_calls_and_streams():
    async def cancel(message: Cancel) -> Acknowledged:
        return Acknowledged()

    async def tokens(message: TokensFrom):
        yield TokenFrame(0, ())

    async with serving("right", "wrong", cancel=cancel, tokens=tokens) as (_, client, address):
        with pytest.raises(Unauthorized):
            await client.call(address, CANCEL, Cancel("r", 1), 5)
        with pytest.raises(Unauthorized):
            async for _ in client.stream(address, TOKENS, TokensFrom("i")):
                pass


async def test_a_deadline_cancels_the_handler_and_raises_peer_lost():
    cancelled = asyncio.Event()

    async def cancel(message: Cancel) -> Acknowledged:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return Acknowledged()

    async with serving(cancel=cancel) as (_, client, address):
        with pytest.raises(PeerLost, match="in time"):
            await client.call(address, CANCEL, Cancel("r", 1), 0.05)
        await asyncio.wait_for(cancelled.wait(), 5)


async def test_leaving_a_stream_closes_its_generator_and_a_stopped_server_ends_it():
    closed = asyncio.Event()

    async def tokens(message: TokensFrom):
        try:
            for i in range(1000000):
                yield TokenFrame(i, ())
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with serving(tokens=tokens) as (server, client, address):
        stream = client.stream(address, TOKENS, TokensFrom("i"))
        assert (await anext(stream)).sequence == 0
        await stream.aclose()
        await asyncio.wait_for(closed.wait(), 5)
        with pytest.raises(PeerLost):
            async for frame in client.stream(address, TOKENS, TokensFrom("i")):
                if frame.sequence == 3:
                    await server.stop(0)


async def test_nobody_listening_is_peer_lost():
    client = RpcClient(UNGUARDED)
    with pytest.raises(PeerLost):
        await client.call("127.0.0.1:1", CANCEL, Cancel("r", 1), 5)
    await client.close()


async def test_the_next_connection_makes_one_that_reaches_nobody_be_forgotten():
    async def cancel(_: Cancel) -> Acknowledged:
        return Acknowledged()

    async with serving(cancel=cancel) as (server, client, gone), serving(cancel=cancel) as (_, _, alive):
        await client.call(gone, CANCEL, Cancel("r", 1), 5)
        await server.stop()
        with pytest.raises(PeerLost):
            await client.call(gone, CANCEL, Cancel("r", 1), 5)
        assert client.addresses == {gone}
        await client.call(alive, CANCEL, Cancel("r", 1), 5)
        assert client.addresses == {alive}, "closed while the call was under way"


async def test_a_closed_connection_is_peer_lost_and_not_a_cancellation():
    entered = asyncio.Event()

    async def cancel(message: Cancel) -> Acknowledged:
        entered.set()
        await asyncio.Event().wait()
        return Acknowledged()

    async with serving(cancel=cancel) as (_, client, address):
        call = asyncio.create_task(client.call(address, CANCEL, Cancel("r", 1), 30))
        await asyncio.wait_for(entered.wait(), 5)
        await client.forget(address)
        with pytest.raises(PeerLost):
            await call


async def test_a_frozen_peer_is_peer_lost_long_before_the_deadline():
    """Keepalive is what notices it: the connection stays open, and nothing comes. (Its own default is a minute.)"""
    program = "import asyncio; from tests.rpc.test_rpc import serve_forever; asyncio.run(serve_forever())"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    client = RpcClient(UNGUARDED)
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        async with asyncio.timeout(30):
            call = asyncio.create_task(client.call(address, CANCEL, Cancel("r", 0), 60))
            await process.stdout.readline()  # the call has arrived
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(PeerLost, match="ping timeout"):
                await call
    finally:
        process.kill()
        await process.wait()
        await client.close()


async def serve_forever() -> None:
    """Prints the address, then a line for every call, none of which it answers."""

    async def cancel(message):
        print("called", flush=True)
        await asyncio.Event().wait()

    server = RpcServer("127.0.0.1", UNGUARDED)
    server.unary(CANCEL, cancel)
    print(f"127.0.0.1:{server.listen()}", flush=True)
    await server.start()
    await asyncio.Event().wait()

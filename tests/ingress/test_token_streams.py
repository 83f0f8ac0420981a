"""The ingress's end of token streams, against decode replicas that misbehave."""

import asyncio

import pytest

from cluster.ingress.token_streams import TokenStreams
from core.config import TransferConfig
from core.errors import PeerLost
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_decode import RenewedLeases, TokenEvent, TokenFrame
from core.security import UNGUARDED
from rpc.client import RpcClient
from rpc.methods import RENEW_LEASES, TOKENS
from rpc.server import RpcServer


def replica_at(address: str) -> ReplicaInfo:
    return ReplicaInfo(
        "d0", Role.DECODE, 7, (address,), KVLayout(2, 4, 8, 16, "float32", 2),
        Compatibility("m", "r", "float32", 16, "h"), 64, 8, 256, 512,
    )  # fmt: skip


async def test_a_replica_that_takes_connections_and_never_answers_is_lost_after_the_grace_time():
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    frozen = await asyncio.start_server(swallow, "127.0.0.1", 0)
    host, port = frozen.sockets[0].getsockname()
    client = RpcClient(UNGUARDED)
    streams = TokenStreams("i", client, TransferConfig(control_timeout_s=0.2, reattach_grace_s=0.5), 16)
    try:
        async with asyncio.timeout(10), streams.subscribe(replica_at(f"{host}:{port}"), "r", 0) as subscription:
            with pytest.raises(PeerLost):
                await subscription.next()
    finally:
        await streams.close()
        await client.close()
        frozen.close()


async def test_a_heartbeat_that_overtakes_the_last_tokens_of_a_request_does_not_end_it():
    """Decode has forgotten "ended" with its last token, which comes late, and "lost" for good."""
    beats, last_tokens_may_come, second_beat_may_come = [], asyncio.Event(), asyncio.Event()

    async def renew(message):
        beats.append(message)
        if len(beats) > 1:
            await second_beat_may_come.wait()
        return RenewedLeases(message.request_ids)

    async def tokens(message):
        yield TokenFrame(0, ())
        await last_tokens_may_come.wait()
        yield TokenFrame(1, (TokenEvent("ended", 0, 0, (5,), finish_reason="length"),))
        await asyncio.get_running_loop().create_future()

    server = RpcServer("127.0.0.1", UNGUARDED)
    server.unary(RENEW_LEASES, renew)
    server.stream(TOKENS, tokens)
    replica = replica_at(f"127.0.0.1:{server.listen()}")
    await server.start()
    client = RpcClient(UNGUARDED)
    streams = TokenStreams("i", client, TransferConfig(lease_ttl_s=0.3), 16)
    try:
        async with (
            asyncio.timeout(10),
            streams.subscribe(replica, "ended", 0) as ended,
            streams.subscribe(replica, "lost", 0) as lost,
        ):
            ended.opened = lost.opened = True
            while len(beats) < 2:  # the first answer has been read
                await asyncio.sleep(0.01)
            last_tokens_may_come.set()
            assert (await ended.next()).token_ids == (5,)
            second_beat_may_come.set()
            with pytest.raises(PeerLost, match="forgotten"):
                await lost.next()
    finally:
        await streams.close()
        await client.close()
        await server.stop()

"""The ingress's end of token streams, against decode replicas that misbehave."""

import asyncio

import pytest

from cluster.ingress.token_streams import TokenStreams
from core.config import TransferConfig
from core.errors import PeerLost
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.security import UNGUARDED
from rpc.client import RpcClient


async def test_a_replica_that_takes_connections_and_never_answers_is_lost_after_the_grace_time():
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    frozen = await asyncio.start_server(swallow, "127.0.0.1", 0)
    host, port = frozen.sockets[0].getsockname()
    replica = ReplicaInfo(
        "d0", Role.DECODE, 7, (f"{host}:{port}",), KVLayout(2, 4, 8, 16, "float32", 2),
        Compatibility("m", "r", "float32", 16, "h"), 64, 8, 256, 512,
    )  # fmt: skip
    client = RpcClient(UNGUARDED)
    streams = TokenStreams("i", client, TransferConfig(control_timeout_s=0.2, reattach_grace_s=0.5), 16)
    try:
        async with asyncio.timeout(10), streams.subscribe(replica, "r", 0) as subscription:
            with pytest.raises(PeerLost):
                await subscription.next()
    finally:
        await streams.close()
        await client.close()
        frozen.close()

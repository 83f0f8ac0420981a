"""How an ingress plans by itself while the global scheduler is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from cluster.ingress.scheduler_client import SchedulerClient
from core.errors import PeerLost
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged, Empty, ReplicaInfo, Role
from core.messages.to_scheduler import Book, Finish, Plan, Reserve
from core.security import UNGUARDED
from rpc.client import RpcClient
from rpc.methods import BOOK, FINISH, RESERVE
from rpc.server import RpcServer


def replica(role: Role, generation: str, max_model_len: int = 512) -> ReplicaInfo:
    layout = KVLayout(2, 4, 8, 16, "float32", 1)
    weights = Compatibility("m", generation, "float32", 16, "h")
    name = f"{role.value}-{generation}"
    return ReplicaInfo(name, role, 1, (f"{name}:1",), layout, weights, 64, 8, 256, max_model_len, generation=generation)


@asynccontextmanager
async def left_alone_with(
    *replicas: ReplicaInfo, weights: dict[str, float] | None = None
) -> AsyncIterator[SchedulerClient]:
    """A client that has read an address book of a scheduler that is gone since."""

    async def book(_: Empty) -> Book:
        return Book(replicas, 0, weights or {})

    server, rpc = RpcServer("127.0.0.1", UNGUARDED), RpcClient(UNGUARDED)
    server.unary(BOOK, book)
    address = f"127.0.0.1:{server.listen()}"
    await server.start()

    async def resolve() -> str:
        return address

    client = SchedulerClient(rpc, resolve)
    client.start()
    try:
        async with asyncio.timeout(10):
            while not client.health().ready:
                await asyncio.sleep(0.01)
        await server.stop()
        yield client
    finally:
        await client.close()
        await rpc.close()


async def plan_alone(client: SchedulerClient, **changes: object) -> Plan:
    request = replace(Reserve("r", 0, "i", 100, 16, (), 60.0), **changes)
    async with client.reservation(request, lambda: Finish("r", 0, 7)) as plan:
        return plan


async def test_pairs_formed_without_the_scheduler_keep_to_one_generation():
    generations = [replica(role, generation) for role in Role for generation in ("v1", "v2")]
    async with left_alone_with(*generations) as client:
        plans = [await plan_alone(client) for _ in range(20)]
        assert all(plan.prefill.generation == plan.decode.generation for plan in plans)
        bound = [await plan_alone(client, attempt=1, generation="v2") for _ in range(10)]
        assert {(plan.prefill.generation, plan.decode.generation) for plan in bound} == {("v2", "v2")}
        last = await plan_alone(client, attempt=1, generation="v2", avoid=("decode-v2", "prefill-v2"))
        assert last.decode.generation == "v2", "rather a replica that failed than other weights"


async def test_the_last_known_traffic_split_goes_on_without_the_scheduler():
    decodes = [replica(Role.DECODE, generation) for generation in ("v1", "v2", "v3")]
    async with left_alone_with(*decodes, weights={"v1": 0.8, "v2": 0.2}) as client:
        chosen = [(await plan_alone(client, request_id=f"r{i}")).decode.generation for i in range(300)]
        assert 0.1 < chosen.count("v2") / 300 < 0.3 and "v3" not in chosen
        assert (await plan_alone(client, request_id="r7")).decode.generation == chosen[7]
        gone = await plan_alone(client, request_id="r7", generation="v0")
        assert gone.decode.generation == chosen[7], "nobody has the weights of its tokens any more"


async def test_decode_prefills_by_itself_when_asked_or_when_no_prefill_can_hold_the_prompt():
    async with left_alone_with(replica(Role.PREFILL, "v1", 99), replica(Role.DECODE, "v1")) as client:
        assert (await plan_alone(client, num_tokens=99)).prefill is not None
        assert (await plan_alone(client, num_tokens=100)).prefill is None
        assert (await plan_alone(client, num_tokens=50, placement="local")).prefill is None


@pytest.mark.parametrize(("can_grow", "ready"), [(True, True), (False, False)])
async def test_a_fleet_scaled_to_zero_is_ready_when_an_autoscaler_can_bring_a_replica(can_grow: bool, ready: bool):
    client = SchedulerClient(RpcClient(UNGUARDED), lambda: asyncio.sleep(0, ""))
    client._take(Book((), can_grow=can_grow))
    health = client.health()
    assert (health.ready, "no decode replica" in health.degraded) == (ready, True)
    assert health.max_model_len is None


@asynccontextmanager
async def scheduler_at(port: int, *replicas: ReplicaInfo) -> AsyncIterator[str]:
    """A scheduler that answers with its address book, and plans everything on the first decode replica it knows."""

    async def book(_: Empty) -> Book:
        return Book(replicas)

    async def reserve(request: Reserve) -> Plan:
        return Plan(request.request_id, request.attempt, None, replicas[0], 0.0, 0.0, f"by {replicas[0].generation}")

    server = RpcServer("127.0.0.1", UNGUARDED)
    server.unary(BOOK, book)
    server.unary(RESERVE, reserve)
    bound = server.listen(port)
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop()


async def test_a_standby_plans_while_the_first_scheduler_is_away_and_no_longer():
    decodes = [replica(Role.DECODE, name) for name in ("first", "standby")]
    rpc = RpcClient(UNGUARDED)
    async with scheduler_at(0, decodes[1]) as standby:
        async with scheduler_at(0, decodes[0]) as first:
            port = int(first.rpartition(":")[2])

            async def resolve_first() -> str:
                return first

            async def resolve_standby() -> str:
                return standby

            client = SchedulerClient(rpc, resolve_first, resolve_standby)
            client.start()
            assert (await plan_alone(client)).reason == "by first"
        try:
            assert (await plan_alone(client)).reason == "by standby"
            async with asyncio.timeout(30):
                while "standby plans" not in client.health().degraded:
                    await asyncio.sleep(0.01)
            async with scheduler_at(port, decodes[0]), asyncio.timeout(30):
                while (await plan_alone(client)).reason != "by first":
                    await asyncio.sleep(0.05)
                while client.health().degraded != "no prefill replica: decode prefills by itself":
                    await asyncio.sleep(0.01)
        finally:
            await client.close()
            await rpc.close()


async def test_the_end_of_a_request_is_told_until_the_scheduler_hears_it():
    """Twice in a row a busy scheduler does not answer: what the request held would be held until it expires."""
    decode, told, heard = replica(Role.DECODE, "v1"), list[Finish](), asyncio.Event()

    async def reserve(request: Reserve) -> Plan:
        return Plan(request.request_id, request.attempt, None, decode, 0.0, 0.0, "")

    async def finish(message: Finish) -> Acknowledged:
        told.append(message)
        if len(told) < 3:
            raise PeerLost("busy")
        heard.set()
        return Acknowledged()

    server, rpc = RpcServer("127.0.0.1", UNGUARDED), RpcClient(UNGUARDED)
    server.unary(RESERVE, reserve)
    server.unary(FINISH, finish)
    address = f"127.0.0.1:{server.listen()}"
    await server.start()
    client = SchedulerClient(rpc, lambda: asyncio.sleep(0, address))
    try:
        await plan_alone(client)
        await asyncio.wait_for(heard.wait(), 10)
        assert told == [Finish("r", 0, 7)] * 3
    finally:
        await client.close()
        await rpc.close()
        await server.stop()

"""What decode's first rank has its ranks fetch: heads in one stage, latents in two."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from core.config import TransferConfig
from core.errors import PeerLost, TransferFailed
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged, ReplicaInfo, Role
from core.messages.to_rank import FetchBlocks, Fetched, SlabHeader, Span
from core.version import PROTOCOL
from rpc import methods
from worker.fetcher import BlockOrder, Fetcher

LATENT = KVLayout(2, 1, 20, 16, "bfloat16", 2, latent=True)
HEADS = KVLayout(2, 4, 8, 16, "bfloat16", 2)
CONFIG = TransferConfig(data_timeout_s=8.0)


def replica(name: str, layout: KVLayout, protocol: int = PROTOCOL) -> ReplicaInfo:
    addresses = tuple(f"{name}:{rank}" for rank in range(layout.num_ranks))
    same = Compatibility("m", "r", "bfloat16", 16, "s")
    return ReplicaInfo(name, Role.DECODE, 1, addresses, layout, same, 9, 1, 64, 64, protocol=protocol)


class Ranks:
    """Agent of the first rank and client to the second: both answer an order of 100 bytes per copy in 3 s."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, FetchBlocks]] = []
        self.failing: set[str] = set()
        self.asked: list[tuple[str, SlabHeader]] = []  # whether it still holds these blocks
        self.holds = True
        self.release = asyncio.Event()
        self.release.set()
        self.gates: list[asyncio.Event] = []  # of the calls to come, in their order

    async def fetch(self, order: FetchBlocks) -> Fetched:
        return await self._done("d:0", order)

    async def call(self, address: str, method: object, order: FetchBlocks, timeout_s: float):
        if method is methods.HOLDS:
            self.asked.append((address, order))
            return Acknowledged(self.holds)
        assert timeout_s == order.timeout_s + 2 * CONFIG.control_timeout_s
        await self.release.wait()
        if self.gates:
            await self.gates.pop(0).wait()
        return await self._done(address, order)

    async def _done(self, address: str, order: FetchBlocks) -> Fetched:
        self.orders.append((address, order))
        if address in self.failing:
            raise PeerLost(f"{address} is gone")
        return Fetched(100 * len(order.copies), 3.0)


def fetch_of(ranks: Ranks, layout: KVLayout) -> "asyncio.Task[Fetched]":
    return fetch_by(fetcher_of(ranks, layout), layout)


def fetcher_of(ranks: Ranks, layout: KVLayout) -> Fetcher:
    spec = SimpleNamespace(transfer=CONFIG, rank=0)
    return Fetcher(SimpleNamespace(spec=spec, info=replica("d", layout), agent=ranks, client=ranks))


def fetch_by(fetcher: Fetcher, layout: KVLayout) -> "asyncio.Task[Fetched]":
    source = replica("p", replace(layout, tensor_parallel=1))
    order = BlockOrder("r", 3, 7, source, 0, 2, 4, (5, 1, 8, 2), (0, 3, 6, 1), 1.0)
    return asyncio.create_task(fetcher.fetch(order))


async def test_heads_come_from_the_source_in_one_stage():
    ranks = Ranks()
    assert await fetch_of(ranks, HEADS) == Fetched(200, 3.0)
    assert [address for address, _ in ranks.orders] == ["d:0", "d:1"]
    for rank, (_, order) in enumerate(ranks.orders):
        (copy,) = order.copies
        assert (copy.source.first_head, copy.source.num_heads) == (2 * rank, 2)
        assert (copy.source.blocks, copy.destination.blocks) == ((5, 1, 8, 2), (0, 3, 6, 1))
        assert order.source_addresses == ("p:0",) and order.timeout_s == 8.0


async def test_latents_are_handed_on_once_every_rank_has_its_share():
    ranks = Ranks()
    ranks.release.clear()
    fetching = fetch_of(ranks, LATENT)
    while not ranks.orders:
        await asyncio.sleep(0)
    assert len(ranks.orders) == 1, "the first rank waits for the second"
    ranks.release.set()
    assert await fetching == Fetched(400, 6.0)
    (_, own), (_, other), *siblings = ranks.orders
    assert [copy.source.blocks for order in (own, other) for copy in order.copies] == [(5, 8), (1, 2)]
    assert [copy.destination.blocks for order in (own, other) for copy in order.copies] == [(0, 6), (3, 1)]
    assert [address for address, _ in siblings] == ["d:0", "d:1"]
    for (_, order), from_rank, blocks in zip(siblings, (1, 0), ((3, 1), (0, 6)), strict=True):
        (copy,) = order.copies
        assert (order.request_id, order.attempt, order.source_addresses) == ("r", 3, ("d:0", "d:1"))
        assert copy.source_rank == from_rank and copy.source.blocks == copy.destination.blocks == blocks
        assert order.source_layout == LATENT and order.timeout_s == 5.0, "both stages have one deadline"


async def test_nothing_is_handed_on_when_a_share_did_not_come():
    ranks = Ranks()
    ranks.failing = {"d:1"}
    with pytest.raises(PeerLost):
        await fetch_of(ranks, LATENT)
    assert len(ranks.orders) == 2


def of_last_layer(source: ReplicaInfo) -> BlockOrder:
    return BlockOrder("r", 3, 7, source, 1, 1, 4, (5, 1), (0, 3), 1.0)


async def test_a_source_whose_first_rank_gave_nothing_is_asked_whether_it_still_held_the_blocks():
    ranks, source = Ranks(), replica("p", replace(HEADS, tensor_parallel=1, pipeline_parallel=2))
    fetcher = fetcher_of(ranks, HEADS)
    assert await fetcher.fetch(of_last_layer(source)) == Fetched(200, 3.0)
    assert [copy.source_rank for _, order in ranks.orders for copy in order.copies] == [1, 1]
    ((address, header),) = ranks.asked
    assert address == "p:0" and (header.request_id, header.attempt, header.lease_id) == ("r", 3, 7)
    assert header.source == Span(1, 1, (5, 1), 0, 1) and header.logical_blocks == (4, 5)
    ranks.holds = False
    with pytest.raises(TransferFailed, match="p no longer held the blocks of request r"):
        await fetcher.fetch(of_last_layer(source))


async def test_a_first_rank_that_gives_its_part_has_checked_it_and_an_old_one_is_not_asked():
    ranks = Ranks()
    await fetcher_of(ranks, HEADS).fetch(of_last_layer(replica("p", replace(HEADS, tensor_parallel=4))))
    share_of_second = replace(
        of_last_layer(replica("p", LATENT, protocol=2)), first_block=5, source_blocks=(1,), destination_blocks=(3,)
    )
    await fetcher_of(ranks, replace(LATENT, tensor_parallel=1)).fetch(share_of_second)
    assert {copy.source_rank for _, order in ranks.orders[-1:] for copy in order.copies} == {1}
    assert ranks.asked == []


async def test_a_rank_without_the_layers_is_not_told():
    ranks, source = Ranks(), replica("p", replace(HEADS, tensor_parallel=1))
    layout = replace(HEADS, tensor_parallel=1, pipeline_parallel=2)
    assert await fetcher_of(ranks, layout).fetch(of_last_layer(source)) == Fetched(100, 3.0)
    assert [address for address, _ in ranks.orders] == ["d:1"]


async def test_channels_are_made_ahead_once_for_each_incarnation_of_a_source():
    asked: list[tuple[str, tuple[str, ...]]] = []

    class Ahead(Ranks):
        def prepare(self, addresses):
            asked.append(("d:0", addresses))

        async def call(self, address, method, message, timeout_s):
            asked.append((address, message.addresses))

    ranks = Ahead()
    context = SimpleNamespace(
        spec=SimpleNamespace(transfer=CONFIG, rank=0), info=replica("d", HEADS), agent=ranks, client=ranks
    )
    fetcher, source = Fetcher(context), replica("p", replace(HEADS, tensor_parallel=4))
    for _ in range(3):
        await fetcher.prepare(source)
    assert asked == [("d:0", ("p:0", "p:1")), ("d:1", ("p:2", "p:3"))]
    await fetcher.prepare(replace(source, incarnation=2))
    assert len(asked) == 4


async def test_two_fetches_of_a_request_hand_on_until_each_is_done():
    """The end of one does not take the right to read from the ranks of the other."""
    ranks, header = Ranks(), SimpleNamespace(request_id="r", attempt=3)
    fetcher = fetcher_of(ranks, LATENT)
    fetches, gates = [], []
    for _ in range(2):
        passing, gate = asyncio.Event(), asyncio.Event()
        passing.set()
        ranks.gates = [passing, gate]  # from the source, then from siblings
        fetches.append(fetch_by(fetcher, LATENT))
        gates.append(gate)
        async with asyncio.timeout(5):
            while ranks.gates:
                await asyncio.sleep(0)
    for fetch, gate, still_reads in zip(fetches, gates, (True, False), strict=True):
        assert fetcher.may_read(header)
        gate.set()
        await fetch
        assert fetcher.may_read(header) == still_reads

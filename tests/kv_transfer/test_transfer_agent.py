"""Agents of several ranks in one process: what a fetch brings, and over which channels."""

import asyncio
import gc
from pathlib import Path

import pytest
from fleet_fetches import DESTINATIONS, PAIRS, SOURCES, fetch_all
from transfer_fleet import Fleet, layout_of

from core.config import TransferConfig
from core.kv_budget import channel_bytes


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("prefill_tp", [1, 2])
@pytest.mark.parametrize("decode_tp", [1, 2])
async def test_blocks_arrive_byte_exact_between_tensor_parallel_degrees(fleet, prefill_tp, decode_tp):
    fleet.start("p", layout_of(prefill_tp), seed=1)
    fleet.start("d", layout_of(decode_tp), seed=2)
    wanted = fleet.full("p", SOURCES)
    others = [b for b in range(24) if b not in DESTINATIONS]
    untouched = fleet.full("d", others)
    assert await fetch_all(fleet, "p", "d") == wanted.numel() * 2
    assert fleet.full("d", DESTINATIONS).equal(wanted)
    assert fleet.full("d", others).equal(untouched)


async def test_many_transfers_share_channels_in_both_directions(fleet):
    fleet.start("a", layout_of(2), num_blocks=64, seed=1)
    fleet.start("b", layout_of(2), num_blocks=64, seed=2)
    wanted = {side: fleet.full(side, list(range(32))) for side in "ab"}
    orders = []
    for rank in range(2):
        for start in range(0, 32, 4):
            pairs = [(b, 32 + b) for b in range(start, start + 4)]
            orders += [(f"b/{rank}", fleet.order("a", "b", rank, pairs, f"ab{start}"))]
            orders += [(f"a/{rank}", fleet.order("b", "a", rank, pairs, f"ba{start}"))]
    await asyncio.gather(*(fleet.agent(address).fetch(order) for address, order in orders))
    assert fleet.full("b", list(range(32, 64))).equal(wanted["a"])
    assert fleet.full("a", list(range(32, 64))).equal(wanted["b"])


async def test_own_blocks_are_copied_without_a_channel(fleet):
    fleet.start("p", layout_of(1), seed=1)
    wanted = fleet.full("p", [1, 2])
    await fleet.agent("p/0").fetch(fleet.order("p", "p", 0, [(1, 11), (2, 12)]))
    assert fleet.full("p", [11, 12]).equal(wanted)


async def test_no_descriptor_is_left_after_all_agents_closed(fleet):
    async def live_and_close() -> int:
        fleet.start("p", layout_of(2), seed=1)
        fleet.start("d", layout_of(2), seed=2)
        await fetch_all(fleet, "p", "d")
        await fleet.stop("d")
        await fleet.stop("p")
        gc.collect()
        return num_fds()

    await live_and_close()  # what libraries open once stays open
    before = await live_and_close()
    assert await live_and_close() <= before  # less: what earlier tests left was collected meanwhile


async def test_channels_keep_within_memory_the_least_recently_used_goes(fleet):
    """Room for two at the receiver: a third peer takes the place of the one that was used longest ago."""
    cost = channel_bytes(fleet.connector_kind, int(fleet.config.slab_mib * 2**20))
    if not cost:
        pytest.skip("this transport's channels cost nothing")
    fleet.config = fleet.config.model_copy(update={"pairs_mib": 2.5 * cost / 2**20})
    for seed, name in enumerate("pqrd"):
        fleet.start(name, layout_of(1), seed=seed)
    agent = fleet.agent("d/0")
    for name in "pqpr":
        await agent.fetch(fleet.order(name, "d", 0, PAIRS))
        assert fleet.full("d", DESTINATIONS).equal(fleet.full(name, SOURCES))
    assert sorted(agent.inbound._links) == ["p/0", "r/0"]
    await agent.fetch(fleet.order("q", "d", 0, PAIRS))
    assert sorted(agent.inbound._links) == ["q/0", "r/0"]
    together = [(name, [(block, 4 * i + block) for block in range(4)]) for i, name in enumerate("pqrpqr")]
    orders = [fleet.order(name, "d", 0, pairs, f"r{i}") for i, (name, pairs) in enumerate(together)]
    await asyncio.gather(*map(agent.fetch, orders))
    for name, pairs in together:
        assert fleet.full("d", [d for _, d in pairs]).equal(fleet.full(name, [s for s, _ in pairs]))


async def test_a_channel_made_ahead_of_use_is_the_one_used(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    agent = fleet.agent("d/0")
    agent.prepare(["p/0", "d/0", "nobody"])
    while not agent.inbound.num_links:
        await asyncio.sleep(0.005)
    await fetch_all(fleet, "p", "d")
    assert agent.inbound._links["p/0"].generation in (1, 2)  # the one to nobody takes a number, too
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))


async def test_measured_tries_each_transport_with_real_slabs_and_keeps_the_fastest(tmp_path):
    fleet = Fleet("measured", TransferConfig(channel="measured", slab_mib=0.002, trial_mib=0.01), folder=tmp_path)
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    agent, used = fleet.agent("d/0"), []
    for number in range(12):
        await agent.fetch(fleet.order("p", "d", 0, PAIRS, f"r{number}"))
        used.append(agent.inbound._links["p/0"].kind)
        assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))
    tried = list(dict.fromkeys(used))
    assert {"shared_memory", "tcp", "gloo"} <= set(tried)
    rates = {kind: agent.inbound._linker._choice._bytes_per_s("", kind) for kind in tried}
    assert used[-1] == max(rates, key=rates.__getitem__)
    await fleet.close()


async def test_a_slow_peer_does_not_hold_up_another(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("q", layout_of(1), seed=3)
    fleet.start("d", layout_of(1), seed=2)
    deliver, release = fleet.control.ready, asyncio.Event()

    async def ready(address, message):
        if address == "p/0":
            await release.wait()
        return await deliver(address, message)

    fleet.control.ready = ready
    slow = asyncio.create_task(fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS[:3], "slow")))
    await fleet.agent("d/0").fetch(fleet.order("q", "d", 0, PAIRS[3:], "fast"))
    assert not slow.done()
    release.set()
    await slow

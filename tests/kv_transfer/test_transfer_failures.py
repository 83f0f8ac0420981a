"""Agents of several ranks in one process: fetches that are cancelled, late, refused or corrupt."""

import asyncio
from dataclasses import replace

import pytest
from fleet_fetches import DESTINATIONS, PAIRS, SOURCES, fetch_all, hold_ready
from transfer_fleet import layout_of

from core.errors import TransferFailed
from core.messages.to_rank import BlockDigests


async def test_a_cancelled_fetch_writes_nothing_more_and_leaves_the_channel_to_others(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    arrived, release = hold_ready(fleet)
    fetching = asyncio.create_task(fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS, "gone")))
    await arrived.wait()
    before = fleet.pools["d/0"].clone()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    release.set()
    other = [(s, d) for s, d in zip(range(4), [b for b in range(24) if b not in DESTINATIONS], strict=False)]
    await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, other, "other"))
    assert fleet.pools["d/0"][:, DESTINATIONS].equal(before[:, DESTINATIONS])
    assert fleet.full("d", [d for _, d in other]).equal(fleet.full("p", [s for s, _ in other]))
    assert fleet.agent("d/0").inbound._links["p/0"].generation == 1


async def test_an_order_that_runs_out_of_time_fails_and_writes_nothing_more(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    _, release = hold_ready(fleet)
    before = fleet.pools["d/0"].clone()
    with pytest.raises(TransferFailed, match=r"within 0\.05 s"):
        await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS, timeout_s=0.05))
    release.set()
    await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, [(0, DESTINATIONS[0])]))
    assert fleet.pools["d/0"][:, DESTINATIONS[1:]].equal(before[:, DESTINATIONS[1:]])


async def test_a_refused_read_fails_the_fetch_and_keeps_the_channel(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    fleet.refused = {"bad"}
    before = fleet.pools["d/0"].clone()
    with pytest.raises(TransferFailed, match="refused a slab"):
        await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS, "bad"))
    assert fleet.pools["d/0"].equal(before)
    await fetch_all(fleet, "p", "d")
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))
    assert fleet.agent("d/0").inbound._links["p/0"].generation == 1


@pytest.mark.parametrize("change", [{"blocks": (1, 2)}, {"num_heads": 1}, {"num_layers": 2}, {"blocks": (99,)}])
async def test_a_malformed_copy_is_refused_before_anything_is_granted(fleet, change):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    order = fleet.order("p", "d", 0, [(0, 0)])
    copy = replace(order.copies[0], destination=replace(order.copies[0].destination, **change))
    with pytest.raises(TransferFailed):
        await fleet.agent("d/0").fetch(replace(order, copies=(copy,)))
    assert fleet.agent("d/0").inbound.num_links == 0


async def test_closing_the_receiver_fails_its_running_fetch(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    arrived, release = hold_ready(fleet)
    fetching = asyncio.create_task(fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS)))
    await arrived.wait()
    closing = asyncio.create_task(fleet.agent("d/0").close())
    release.set()
    with pytest.raises(TransferFailed):
        await fetching
    await closing
    with pytest.raises(TransferFailed, match="closed"):
        await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS))


async def test_a_channel_that_is_being_made_while_the_receiver_closes_ends_with_it(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    asked, release = asyncio.Event(), asyncio.Event()
    connect_to = fleet.control.connect

    async def connect(address, message):
        asked.set()
        await release.wait()
        return await connect_to(address, message)

    fleet.control.connect = connect
    fleet.agent("d/0").prepare(["p/0"])
    await asked.wait()
    closing = asyncio.create_task(fleet.agent("d/0").close())
    await asyncio.sleep(0)
    release.set()
    await closing
    assert fleet.agent("d/0").inbound.num_links == 0


async def test_bytes_that_differ_from_the_senders_fail_the_fetch_by_their_digest(fleet):
    fleet.config = fleet.config.model_copy(update={"digest_share": 1.0})
    fleet.start("p", layout_of(2), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    done = await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS))
    assert done.num_digests > 1
    answer = fleet.control.digest

    async def digest(address, message):
        digests = (await answer(address, message)).digests
        return BlockDigests((digests[0] ^ (1 << 40), *digests[1:]) if address == "p/1" else digests)

    fleet.control.digest = digest
    with pytest.raises(TransferFailed, match="p/1 are not what was sent") as caught:
        await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS))
    assert caught.value.field == "digest"


async def test_only_the_request_that_may_not_be_read_fails_of_those_granted_together(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    fleet.refused = {"bad"}
    arrived, release = hold_ready(fleet)
    agent = fleet.agent("d/0")
    first = asyncio.create_task(agent.fetch(fleet.order("p", "d", 0, PAIRS[:2], "first")))
    await arrived.wait()  # what comes now waits for room, and is granted together
    bad = asyncio.create_task(agent.fetch(fleet.order("p", "d", 0, PAIRS[2:5], "bad")))
    good = asyncio.create_task(agent.fetch(fleet.order("p", "d", 0, PAIRS[5:], "good")))
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(first, good)
    with pytest.raises(TransferFailed, match="refused a slab of request bad"):
        await bad
    assert agent.inbound._links["p/0"].generation == 1
    arrived = [*PAIRS[:2], *PAIRS[5:]]
    assert fleet.full("d", [d for _, d in arrived]).equal(fleet.full("p", [s for s, _ in arrived]))

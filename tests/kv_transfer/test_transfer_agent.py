"""Agents of several ranks in one process: what a fetch promises, whatever happens to peers and callers."""

import asyncio
import gc
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from transfer_fleet import COMPATIBILITY, Fleet, layout_of, random_pairs

from core.config import TransferConfig
from core.errors import Incompatible, PeerLost, StaleMessage, TransferFailed
from core.kv_budget import channel_bytes
from core.kv_layout import Compatibility, KVLayout
from core.messages.to_rank import BlockDigests, CloseChannel, Connect, Granted, Offer, Ready, SlabHeader, Span
from kv_transfer.agent import TransferAgent

PAIRS = random_pairs(10, 24, 3)
SOURCES, DESTINATIONS = ([s for s, _ in PAIRS], [d for _, d in PAIRS])


def replace_config(config: TransferConfig, **changes) -> TransferConfig:
    return config.model_copy(update=changes)


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest_asyncio.fixture(params=["in_process", "strict", "gloo", "tcp", "shared_memory"])
async def fleet(request, tmp_path):
    fleet = Fleet(request.param, folder=tmp_path)
    yield fleet
    await fleet.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("channel")] == []


async def fetch_all(fleet: Fleet, source: str, destination: str, pairs=PAIRS) -> int:
    ranks = range(fleet.layouts[destination].tensor_parallel)
    orders = [fleet.order(source, destination, rank, pairs) for rank in ranks]
    done = await asyncio.gather(*(fleet.agent(f"{destination}/{r}").fetch(orders[r]) for r in ranks))
    return sum(fetched.num_bytes for fetched in done)


def hold_ready(fleet: Fleet) -> tuple[asyncio.Event, asyncio.Event]:
    """Ready calls set `arrived` and wait for `release` before they reach the sender."""
    arrived, release = asyncio.Event(), asyncio.Event()
    deliver = fleet.control.ready

    async def ready(address, message):
        arrived.set()
        await release.wait()
        return await deliver(address, message)

    fleet.control.ready = ready
    return arrived, release


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


async def test_an_unanswered_grant_ends_the_channel_and_the_next_fetch_builds_another(fleet):
    fleet.config = TransferConfig(slab_mib=0.002, control_timeout_s=0.05)
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    deliver = fleet.control.ready
    _, release = hold_ready(fleet)
    with pytest.raises(PeerLost):
        await fleet.agent("d/0").fetch(fleet.order("p", "d", 0, PAIRS))
    fleet.control.ready = deliver
    release.set()
    await fetch_all(fleet, "p", "d")
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))
    assert fleet.agent("d/0").inbound._links["p/0"].generation == 2


async def test_a_channel_that_ends_while_a_grant_is_answered_is_replaced_within_the_same_fetch(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    deliver, inbound = fleet.control.ready, fleet.agent("d/0").inbound

    async def ready(address, message):
        fleet.control.ready = deliver
        granted = await deliver(address, message)
        await inbound._drop(inbound._links["p/0"], "failed")
        return granted

    fleet.control.ready = ready
    await fetch_all(fleet, "p", "d")
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))
    assert inbound._links["p/0"].generation == 2
    assert inbound._flow.in_flight == {}


async def test_a_dead_peer_is_lost(fleet):
    fleet.start("p", layout_of(2), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    await fleet.stop("p")
    with pytest.raises(PeerLost):
        await fetch_all(fleet, "p", "d")


async def test_a_peer_that_dies_between_grant_and_slab_fails_the_fetch(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    deliver, sender = fleet.control.ready, fleet.agent("p/0")

    async def ready(address, message):
        answer = await deliver(address, Ready(message.receiver, message.receiver_incarnation, 1, message.slabs[:1]))
        await fleet.stop("p")
        return answer

    fleet.control.ready = ready
    with pytest.raises((TransferFailed, PeerLost)):
        await fetch_all(fleet, "p", "d")
    assert sender.outbound._links == {}


async def test_a_silent_sender_is_given_up_after_the_data_timeout(fleet):
    if fleet.kind == "shared_memory":
        pytest.skip("a one-sided channel does not wait for its sender")
    fleet.config = TransferConfig(data_timeout_s=0.1)
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    deliver = fleet.control.ready

    async def ready(address, message):
        return Granted()

    fleet.control.ready = ready
    with pytest.raises(TransferFailed):
        await fetch_all(fleet, "p", "d")
    fleet.control.ready = deliver
    await fetch_all(fleet, "p", "d")
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))


async def test_a_restarted_sender_is_connected_to_anew_within_the_same_fetch(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    await fetch_all(fleet, "p", "d", [(0, 0)])
    await fleet.stop("p")
    fleet.start("p", layout_of(1), incarnation=2, seed=5)
    await fetch_all(fleet, "p", "d")
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))


async def test_a_restarted_receiver_replaces_its_old_channel_although_generations_begin_anew(fleet):
    fleet.start("p", layout_of(1), seed=1)
    fleet.start("d", layout_of(1), seed=2)
    await fetch_all(fleet, "p", "d", [(0, 0)])
    crashed = fleet.control.agents.pop("d/0")
    old_end = fleet.agent("p/0").outbound._links["d/0"].end
    fleet.start("d", layout_of(1), incarnation=2, seed=3)
    await fetch_all(fleet, "p", "d")
    assert fleet.full("d", DESTINATIONS).equal(fleet.full("p", SOURCES))
    assert not old_end.is_open
    await crashed.close()
    assert fleet.agent("p/0").outbound._links["d/0"].end.is_open, "a stale close must not end the new channel"


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
    assert await live_and_close() == await live_and_close()


async def test_bytes_that_differ_from_the_senders_fail_the_fetch_by_their_digest(fleet):
    fleet.config = replace_config(fleet.config, digest_share=1.0)
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


async def test_channels_keep_within_memory_the_least_recently_used_goes(fleet):
    """Room for two at the receiver: a third peer takes the place of the one that was used longest ago."""
    cost = channel_bytes(fleet.connector_kind, int(fleet.config.slab_mib * 2**20))
    if not cost:
        pytest.skip("this transport's channels cost nothing")
    fleet.config = replace_config(fleet.config, pairs_mib=2.5 * cost / 2**20)
    for seed, name in enumerate("pqrd"):
        fleet.start(name, layout_of(1), seed=seed)
    agent = fleet.agent("d/0")
    for name in "pqpr":
        await agent.fetch(fleet.order(name, "d", 0, PAIRS))
        assert fleet.full("d", DESTINATIONS).equal(fleet.full(name, SOURCES))
    assert sorted(agent.inbound._links) == ["p/0", "r/0"]
    await agent.fetch(fleet.order("q", "d", 0, PAIRS))
    assert sorted(agent.inbound._links) == ["q/0", "r/0"]
    await asyncio.gather(*(agent.fetch(fleet.order(name, "d", 0, PAIRS, f"r{i}")) for i, name in enumerate("pqrpqr")))


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


# ---- the sender's handlers, spoken to directly ------------------------------------------------------------------


def connect(sender: TransferAgent, generation: int = 1, incarnation: int = 1, **changes) -> Connect:
    (connector,) = sender._connectors
    offers = (Offer("pigeon", ""), Offer(connector.kind, connector.reach))
    fields = {"compatibility": COMPATIBILITY, "layout": layout_of(1), "offers": offers} | changes
    return Connect("d/0", incarnation, generation, **fields)


def ready(sequence: int, generation: int = 1, incarnation: int = 1, blocks=(0,)) -> Ready:
    return Ready("d/0", incarnation, generation, (SlabHeader(sequence, "r", 1, Span(0, 3, blocks, 0, 4)),))


@pytest.fixture
def sender(fleet):
    fleet.start("p", layout_of(1), seed=1)
    return fleet.agent("p/0")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"compatibility": Compatibility("other", "r1", "bfloat16", 16, "scheme")}, "model"),
        ({"compatibility": Compatibility("demo", "r1", "bfloat16", 16, "other")}, "hash_scheme"),
        ({"layout": KVLayout(3, 4, 16, 4, "bfloat16", 1)}, "head_dim"),
        ({"layout": KVLayout(3, 4, 8, 6, "bfloat16", 1)}, "block_size"),
        ({"wire_dtype": "float8_e4m3fn"}, "wire_dtype"),
        ({"offers": (Offer("shared_memory", "another host"),)}, "transfer.channel"),
    ],
)
async def test_an_incompatible_receiver_is_refused_by_field(sender, change, field):
    with pytest.raises(Incompatible) as caught:
        await sender.on_connect(connect(sender, **change))
    assert caught.value.field == field


async def test_generations_only_grow_and_a_repeated_connect_changes_nothing(sender):
    answer = await sender.on_connect(connect(sender, 2))
    end = sender.outbound._links["d/0"].end
    assert await sender.on_connect(connect(sender, 2)) == answer
    assert sender.outbound._links["d/0"].end is end
    with pytest.raises(StaleMessage):
        await sender.on_connect(connect(sender, 1))
    await sender.on_connect(connect(sender, 3))
    assert not end.is_open


async def test_grants_of_another_generation_incarnation_or_place_are_stale(sender):
    await sender.on_connect(connect(sender, 2))
    for message in (ready(0, 1), ready(0, 3), ready(0, 2, incarnation=7), ready(1, 2)):
        with pytest.raises(StaleMessage) as caught:
            await sender.on_ready(message)
        assert caught.value.field == "generation"
    outside = Ready("d/0", 1, 2, (*ready(0, 2).slabs, *ready(1, 2, blocks=(24,)).slabs, *ready(2, 2).slabs))
    assert (await sender.on_ready(outside)).refused == (1,)
    assert (await sender.on_ready(ready(3, 2))).refused == ()


async def test_a_repeated_grant_is_not_sent_twice_and_a_channel_ends_when_its_receiver_closes_it(sender):
    await sender.on_connect(connect(sender))
    assert (await sender.on_ready(ready(0))).known
    assert not (await sender.on_ready(ready(0))).known
    assert sender.outbound._links["d/0"].session.next_sequence == 1
    end = sender.outbound._links["d/0"].end
    assert not (await sender.on_close(CloseChannel("d/0", 1, 9))).known
    assert (await sender.on_close(CloseChannel("d/0", 1, 1))).known
    assert not end.is_open and not sender.outbound._links

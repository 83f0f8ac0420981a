"""Agents of several ranks in one process: fetches from peers that die, fall silent or come back."""

import pytest
from fleet_fetches import DESTINATIONS, PAIRS, SOURCES, fetch_all, hold_ready
from transfer_fleet import layout_of

from core.config import TransferConfig
from core.errors import PeerLost, TransferFailed
from core.messages.to_rank import Granted, Ready


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

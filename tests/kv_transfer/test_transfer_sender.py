"""The handlers of an agent that sends, spoken to directly: which connections and grants it refuses."""

import pytest
from transfer_fleet import COMPATIBILITY, layout_of

from core.errors import Incompatible, StaleMessage
from core.kv_layout import Compatibility, KVLayout
from core.messages.to_rank import CloseChannel, Connect, Offer, Ready, SlabHeader, Span
from kv_transfer.agent import TransferAgent


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

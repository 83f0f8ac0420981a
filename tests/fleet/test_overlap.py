"""What the timelines of both ranks tell of a handoff over a slow wire, with overlap and without."""

import asyncio
import random
import threading
from itertools import pairwise

import pytest
import torch

from bench.handoff_timeline import HandoffTimeline, print_timeline, read_handoff
from bench.slow_link import SlowConnector, Speed
from core.config import PoolConfig, TransferConfig
from core.messages.fleet import Role
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.in_process import Hub, InProcessConnector
from kv_transfer.channels.protocol import ChannelId, Landing, Terms
from kv_transfer.channels.two_sided import TwoSidedReceiver
from tests.fleet.in_process_fleet import generate, running_fleet
from tests.fleet.test_fleet import reference

NUM_TOKENS = 300
NUM_BYTES = 19 * 3 * 2 * 2 * 16 * 16 * 4  # blocks, layers, K and V, heads, head size, tokens of a block, bytes
FINE = TransferConfig(layers_per_group=1, slab_mib=0.01, digest_share=0)
COARSE = TransferConfig(layers_per_group=3, last_layers_per_group=3, digest_share=0)
HALVED = TransferConfig(layers_per_group=3, last_layers_per_group=1, digest_share=0)
PROMPT = [random.Random(5).randrange(256) for _ in range(NUM_TOKENS)]


class Wires:
    """In-process channels behind wires of 20 MB/s; tells when the first slab has come."""

    def __init__(self, monkeypatch) -> None:
        self.hub = Hub()
        self.first_came = threading.Event()
        receive = TwoSidedReceiver.fetch

        def fetch(end, *args):
            future = receive(end, *args)
            future.add_done_callback(lambda _: self.first_came.set())
            return future

        monkeypatch.setattr(TwoSidedReceiver, "fetch", fetch)

    def connect(self, config, host, pool, path):
        return (SlowConnector(InProcessConnector(self.hub, pool), pool, lambda: Speed(2e7, 0.0001)),)


async def hand_off(fleet, name: str) -> HandoffTimeline:
    await generate(fleet, name, PROMPT, 4)
    infos = {replica.info.role: replica.info for replica in fleet.replicas.values()}
    return await read_handoff(fleet._plane.client, infos, name)


def last_compute(timeline: HandoffTimeline) -> float:
    return max(event.ended_at for event in timeline.prefill if event.phase == "compute")


def slabs(timeline: HandoffTimeline) -> list[tuple]:
    """(wait, wire, scatter) of each slab that decode received."""
    events = [event for event in timeline.decode if event.phase in ("wait", "wire", "scatter")]
    assert len(events) % 3 == 0
    return list(zip(*[iter(events)] * 3, strict=True))


async def test_the_first_slabs_come_while_the_rest_is_computed(tiny_llama, monkeypatch):
    path, _ = tiny_llama
    wires = Wires(monkeypatch)
    pool = PoolConfig(num_blocks=128, max_num_seqs=8, max_num_batched_tokens=64)
    async with running_fleet(path, 1, 1, pool=pool, transfer=FINE, connect=wires.connect) as fleet:
        runner = fleet.replicas["p0"].service._context.engine.runner
        launch = runner.launch

        def launch_last_when_something_came(batch, *args):
            if batch.sequences[0].draw is not None:
                assert wires.first_came.wait(10), "nothing was announced before the last chunk"
            return launch(batch, *args)

        monkeypatch.setattr(runner, "launch", launch_last_when_something_came)
        timeline = await hand_off(fleet, "fine")
        await fleet.until_quiet()
    computed = [event for event in timeline.prefill if event.phase == "compute"]
    assert len(computed) == 3 * 5, "layer groups by chunks"
    assert all(before.ended_at <= after.begun_at for before, after in pairwise(computed))
    wires_seen = [wire for _, wire, _ in slabs(timeline)]
    assert wires_seen[0].begun_at < last_compute(timeline) < wires_seen[-1].ended_at
    assert sum(wire.num_bytes for wire in wires_seen) == NUM_BYTES
    (whole,) = [event for event in timeline.decode if event.phase == "handoff"]
    assert (whole.num_bytes, timeline.num_bytes) == (NUM_BYTES, NUM_BYTES)
    assert whole.begun_at < computed[0].begun_at
    assert whole.ended_at >= max(scatter.ended_at for _, _, scatter in slabs(timeline))
    for wait, wire, scatter in slabs(timeline):
        assert wait.begun_at < wait.ended_at == wire.begun_at < wire.ended_at == scatter.begun_at < scatter.ended_at
    assert all(before.ended_at <= after.begun_at for before, after in pairwise(wires_seen)), "one wire, one slab"
    gathered = [event for event in timeline.prefill if event.phase == "gather"]
    assert sum(event.num_bytes for event in gathered) == NUM_BYTES


async def test_with_one_chunk_and_one_group_nothing_travels_before_all_is_computed(tiny_llama, monkeypatch, capsys):
    path, _ = tiny_llama
    wires = Wires(monkeypatch)
    pool = PoolConfig(num_blocks=128, max_num_seqs=8, max_num_batched_tokens=NUM_TOKENS)
    async with running_fleet(path, 1, 1, pool=pool, transfer=COARSE, connect=wires.connect) as fleet:
        timeline = await hand_off(fleet, "coarse")
    assert len([event for event in timeline.prefill if event.phase == "compute"]) == 1
    assert min(wire.begun_at for _, wire, _ in slabs(timeline)) > last_compute(timeline)
    assert timeline.num_bytes == NUM_BYTES
    print_timeline(timeline)
    told = capsys.readouterr().out
    assert [line.split()[:2] for line in told.splitlines()[:-1]] == [
        ["prefill", "compute"],
        ["prefill", "draw"],
        ["prefill", "gather"],
        ["prefill", "wire"],
        ["decode", "wait"],
        ["decode", "wire"],
        ["decode", "scatter"],
        ["decode", "handoff"],
    ]
    assert "hidden" in told.splitlines()[-1]


async def test_only_the_last_chunk_comes_in_smaller_and_smaller_groups(tiny_llama, monkeypatch):
    path, _ = tiny_llama
    pool = PoolConfig(num_blocks=128, max_num_seqs=8, max_num_batched_tokens=128)
    async with running_fleet(path, 1, 1, pool=pool, transfer=HALVED, connect=Wires(monkeypatch).connect) as fleet:
        timeline = await hand_off(fleet, "halved")
    assert len([event for event in timeline.prefill if event.phase == "compute"]) == 1 + 1 + 2
    layer_bytes = NUM_BYTES // 19 // 3
    sizes = [wire.num_bytes // layer_bytes for _, wire, _ in slabs(timeline)]
    assert sorted(sizes, reverse=True) == [3 * 8, 3 * 8, 2 * 3, 1 * 3], "in whatever order their announcements came"


async def test_many_handoffs_at_a_time_keep_their_events_apart(tiny_llama, monkeypatch):
    path, model = tiny_llama
    wires = Wires(monkeypatch)
    rng = random.Random(6)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (20, 100, 250)]
    async with running_fleet(path, 1, 1, transfer=FINE, connect=wires.connect) as fleet:
        outputs = await asyncio.gather(*(generate(fleet, f"r{i}", prompt, 4) for i, prompt in enumerate(prompts)))
        assert outputs == [reference(model, prompt, 4) for prompt in prompts]
        infos = {Role.PREFILL: fleet.replicas["p0"].info, Role.DECODE: fleet.replicas["d0"].info}
        timelines = [await read_handoff(fleet._plane.client, infos, f"r{i}") for i in range(3)]
    num_blocks = [2, 7, 16]
    assert [timeline.num_bytes for timeline in timelines] == [NUM_BYTES // 19 * num for num in num_blocks]
    assert all(timeline.computed_at < timeline.ready_at for timeline in timelines)


@pytest.mark.parametrize("cut", [False, True])
def test_a_wire_takes_slabs_one_after_another_until_it_is_cut(cut):
    hub = Hub()
    source, target = torch.arange(2 * 4 * 2 * 1 * 16 * 8.0).view(2, 4, 2, 1, 16, 8), torch.zeros(2, 4, 2, 1, 16, 8)
    speed = Speed(1.0 if cut else 1e6, 0.0)
    sender = SlowConnector(InProcessConnector(hub, source), source, lambda: speed)
    receiver = SlowConnector(InProcessConnector(hub, target), target, lambda: speed)
    terms = Terms(ChannelId("a", "b", 1, 1), "token")
    ends = sender.sender_end(terms), receiver.receiver_end(terms, sender.rendezvous)
    spans = [Span(0, 2, (block,), 0, 1) for block in range(4)]
    headers = [SlabHeader(i, "r", 0, span) for i, span in enumerate(spans)]
    futures = [ends[1].fetch(header, header.source, Landing(), 10) for header in headers]
    for header in headers:
        ends[0].send(header, 10)
    if cut:
        ends[1].abort("enough")
        assert all("cut" in str(future.exception(5)) for future in futures)
        assert not ends[1].is_open
    else:
        passages = [future.result(5) for future in futures]
        assert [p.turned_at - p.begun_at for p in passages] == pytest.approx([2 * 2 * 16 * 8 * 4 / 1e6] * 4)
        assert all(before.turned_at <= after.begun_at for before, after in pairwise(passages))
        assert torch.equal(source, target)
        ends[1].abort("done")
    ends[0].abort("done")

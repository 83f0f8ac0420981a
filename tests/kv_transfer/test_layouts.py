"""Agents of replicas that keep their KV in different ways: parallel degrees, block sizes, latents, dtypes."""

import asyncio
import random
import threading
from copy import copy
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
from transfer_fleet import Fleet, random_pools

from core.errors import TransferFailed
from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from core.messages.to_rank import Copy, FetchBlocks, SlabHeader
from kv_transfer.digest import digest
from kv_transfer.plan import Move, Stages, plan_stages

DEGREES = [1, 2, 4]
SIZES = [8, 16, 32]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]
HEADS = KVLayout(4, 4, 8, 16, "bfloat16", 1)
GROUPS = (KVGroup((1, 3)), KVGroup((0, 2), 20))
LATENT = KVLayout(4, 1, 20, 16, "bfloat16", 1, latent=True)
NUM_TOKENS = 512  # of every pool


@pytest_asyncio.fixture(params=["in_process", "strict"])
async def fleet(request, tmp_path):
    fleet = Fleet(request.param, folder=tmp_path)
    yield fleet
    await close(fleet)


async def close(fleet: Fleet) -> None:
    await fleet.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("channel")] == []


class Story:
    """A handoff of `tokens` of a sequence whose blocks lie at random places of both replicas."""

    def __init__(self, fleet: Fleet, source: KVLayout, destination: KVLayout, tokens: range, seed: int = 0) -> None:
        self.fleet, self.tokens, self.layouts = fleet, tokens, (source, destination)
        chosen = random.Random(seed)
        for name, layout in (("p", source), ("d", destination)):
            fleet.start(name, layout, NUM_TOKENS // layout.block_size, seed=ord(name))
        self.blocks = tuple(self._random_blocks(layout.block_size, chosen) for layout in self.layouts)

    def _random_blocks(self, size: int, chosen: random.Random) -> tuple[int, ...]:
        num_blocks = (self.tokens.stop - 1) // size + 1 - self.tokens.start // size
        return tuple(chosen.sample(range(NUM_TOKENS // size), num_blocks))

    @property
    def moved(self) -> range:
        """The tokens, up to the end of the last piece."""
        piece = min(layout.block_size for layout in self.layouts)
        return range(self.tokens.start, -(-self.tokens.stop // piece) * piece)

    def window(self, tokens: range) -> "Story":
        """A part of the sequence that begins and ends with blocks of both sides."""
        part = copy(self)
        part.tokens = tokens
        part.blocks = tuple(
            blocks[tokens.start // layout.block_size : tokens.stop // layout.block_size]
            for blocks, layout in zip(self.blocks, self.layouts, strict=True)
        )
        return part

    def stages(self, rank: int, layers: range) -> Stages:
        return plan_stages(Move(*self.layouts, layers, *self.blocks, self.tokens), rank)

    async def hand_over(self, layers: range) -> int:
        """Both stages on all ranks; returns the bytes that they received."""
        source, destination = self.layouts
        stages = [self.stages(rank, layers) for rank in range(destination.num_ranks)]
        return await self._fetch("p", source, [stage.from_source for stage in stages]) + await self._fetch(
            "d", destination, [stage.from_siblings for stage in stages]
        )

    async def _fetch(self, replica: str, layout: KVLayout, copies: list[tuple[Copy, ...]]) -> int:
        addresses = tuple(f"{replica}/{rank}" for rank in range(layout.num_ranks))
        orders = [FetchBlocks("r", 1, addresses, layout, part, 20.0) for part in copies]
        done = await asyncio.gather(*(self.fleet.agent(f"d/{rank}").fetch(order) for rank, order in enumerate(orders)))
        return sum(fetched.num_bytes for fetched in done)

    def rows(self, pool: torch.Tensor, side: int) -> torch.Tensor:
        """The bytes of the tokens moved, [layers, planes, heads, tokens, bytes], wherever their blocks lie."""
        size, blocks = self.layouts[side].block_size, list(self.blocks[side])
        held = pool.view(torch.uint8)[:, blocks].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
        offset = self.tokens.start % size
        return held[:, :, :, offset : offset + len(self.moved)]

    async def run(self, layers: range) -> None:
        """Hands over, and compares every byte of every rank: those wanted with the source's, the others with before."""
        source, destination = self.layouts
        before = random_pools(destination, NUM_TOKENS // destination.block_size, seed=ord("d"))
        one_rank = replace(source, tensor_parallel=1, pipeline_parallel=1)
        whole = random_pools(one_rank, NUM_TOKENS // source.block_size, seed=ord("p"))[0]
        wanted = self.rows(whole, 0)
        num_bytes = await self.hand_over(layers)
        for rank, expected in enumerate(before):
            heads, held = destination.heads_of_rank(rank), destination.places_of_stage(destination.stage_of(rank), 0)
            places = range(max(layers.start, held.start), min(layers.stop, held.stop))
            mine = wanted[places.start : places.stop, :, heads.start : heads.stop]
            there = slice(places.start - held.start, places.stop - held.start) if places else slice(0)
            got = self.fleet.pools[f"d/{rank}"]
            assert self.rows(got, 1)[there].equal(mine)
            size, blocks = destination.block_size, self.blocks[1]
            raw = expected.view(torch.uint8)
            for index, position in enumerate(self.moved):
                block = blocks[position // size - self.tokens.start // size]
                raw[there, block, :, :, position % size] = mine[:, :, :, index]
            assert got.view(torch.uint8).equal(raw), "what was not wanted stays as it was"
        ranks = destination.tensor_parallel
        of_one_head = wanted[layers.start : layers.stop, :, :1]
        assert num_bytes == ranks * destination.heads_per_rank * of_one_head.numel()


@pytest.mark.parametrize("source_tp", DEGREES)
@pytest.mark.parametrize("destination_tp", DEGREES)
@pytest.mark.parametrize("kind", [HEADS, replace(HEADS, num_kv_heads=2), LATENT], ids=["heads", "few heads", "latent"])
async def test_every_pair_of_degrees_in_unlike_blocks(fleet, kind, source_tp, destination_tp):
    source = replace(kind, tensor_parallel=source_tp, block_size=32)
    destination = replace(kind, tensor_parallel=destination_tp, block_size=16)
    await Story(fleet, source, destination, range(16, 144)).run(range(4))


@pytest.mark.parametrize("source_tp", DEGREES)
@pytest.mark.parametrize("destination_tp", DEGREES)
async def test_blocks_of_one_kv_group_have_places_for_its_layers_alone(fleet, source_tp, destination_tp):
    grouped = replace(HEADS, groups=GROUPS)
    source = replace(grouped, tensor_parallel=source_tp, block_size=32)
    destination = replace(grouped, tensor_parallel=destination_tp, block_size=16)
    assert destination.block_bytes_per_rank * 2 == replace(destination, groups=()).block_bytes_per_rank
    await Story(fleet, source, destination, range(16, 144)).run(range(2))


@pytest.mark.parametrize("source_degrees", [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("destination_degrees", [(1, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", [HEADS, LATENT, replace(HEADS, groups=GROUPS)], ids=["heads", "latent", "groups"])
async def test_stages_of_a_pipeline_in_either_direction(fleet, kind, source_degrees, destination_degrees):
    """(tensor parallel, pipeline parallel) of the two sides, in unlike blocks."""
    layouts = []
    for (tensor_parallel, stages), size in ((source_degrees, 32), (destination_degrees, 16)):
        layouts.append(replace(kind, tensor_parallel=tensor_parallel, pipeline_parallel=stages, block_size=size))
    for layouts_in_turn in (layouts, layouts[::-1]):
        story = Story(Fleet(fleet.kind), *layouts_in_turn, range(32, 144))
        await story.run(range(story.layouts[0].num_places))
        await story.fleet.close()


@pytest.mark.parametrize("source_size", SIZES)
@pytest.mark.parametrize("destination_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [HEADS, LATENT], ids=["heads", "latent"])
async def test_every_pair_of_block_sizes_in_every_dtype(fleet, kind, dtype, source_size, destination_size):
    source = replace(kind, dtype=dtype, block_size=source_size, tensor_parallel=2)
    destination = replace(kind, dtype=dtype, block_size=destination_size)
    first = min(source_size, destination_size)  # inside a block of the coarser side
    await Story(fleet, source, destination, range(first, first + 96), seed=source_size).run(range(1, 3))


async def test_a_sequence_that_is_announced_in_windows_of_layers_and_tokens_arrives_whole(fleet):
    source, destination = replace(HEADS, block_size=32, tensor_parallel=2), replace(HEADS, block_size=8)
    story = Story(fleet, source, destination, range(160))
    for tokens in (range(64), range(64, 160)):
        for layers in (range(3), range(3, 4)):
            await story.window(tokens).hand_over(layers)
    whole = random_pools(replace(source, tensor_parallel=1), NUM_TOKENS // 32, seed=ord("p"))[0]
    assert story.rows(fleet.pools["d/0"], 1).equal(story.rows(whole, 0))


@pytest.mark.parametrize("kind", ["gloo", "shared_memory"])
@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (replace(HEADS, tensor_parallel=2), replace(HEADS, tensor_parallel=4, block_size=32)),
        (replace(HEADS, block_size=32, dtype="float8_e4m3fn"), replace(HEADS, block_size=8, dtype="float8_e4m3fn")),
        (replace(LATENT, tensor_parallel=2, block_size=32), replace(LATENT, tensor_parallel=4, block_size=8)),
        (replace(HEADS, pipeline_parallel=3), replace(HEADS, tensor_parallel=2, pipeline_parallel=2)),
    ],
    ids=["heads", "float8", "latent", "stages"],
)
async def test_other_channels_carry_them_too(kind, source, destination, tmp_path):
    fleet = Fleet(kind, folder=tmp_path)
    await Story(fleet, source, destination, range(32, 132)).run(range(4))
    await close(fleet)


async def test_digests_of_source_and_destination_are_equal_copy_by_copy(fleet):
    source, destination = replace(HEADS, tensor_parallel=2, block_size=32), replace(HEADS, tensor_parallel=4)
    story = Story(fleet, source, destination, range(32, 128))
    copies = [(rank, part) for rank in range(4) for part in story.stages(rank, range(4)).from_source]

    def digests() -> list[tuple[int, int]]:
        pools = fleet.pools
        return [
            (digest(pools[f"p/{part.source_rank}"], part.source), digest(pools[f"d/{rank}"], part.destination))
            for rank, part in copies
        ]

    assert all(sent != received for sent, received in digests())
    await story.hand_over(range(4))
    assert all(sent == received for sent, received in digests())


async def test_a_sibling_that_may_not_read_leaves_the_others_whole(fleet):
    source, destination = replace(LATENT), replace(LATENT, tensor_parallel=2)
    story = Story(fleet, source, destination, range(64))
    stages = [story.stages(rank, range(4)) for rank in range(2)]
    await story._fetch("p", source, [stage.from_source for stage in stages])
    asked: list[SlabHeader] = []
    fleet.agent("d/1").outbound._may_read = lambda header: asked.append(header) is not None
    before = fleet.pools["d/0"].clone()
    with pytest.raises(TransferFailed, match="refused a slab"):
        await story._fetch("d", destination, [stages[0].from_siblings, ()])
    assert fleet.pools["d/0"].equal(before)
    blocks = {block for header in asked for block in header.source.physical_blocks(16)}
    assert {(header.request_id, header.attempt) for header in asked} == {("r", 1)} and blocks <= set(story.blocks[1])

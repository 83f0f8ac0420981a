"""Plans between all tensor parallel degrees, carried out on tensors, give the bytes of the full-heads pool."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fleet import random_pools

from core.errors import Incompatible
from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from core.messages.to_rank import Copy
from kv_transfer.plan import Move, plan_copies, plan_stages, source_ranks, split_into_slabs
from kv_transfer.spans import copy_span, span_bytes

DEGREES = [1, 2, 4, 8]

GROUPS = (KVGroup((0, 1, 2), 4),)


def layout_of(tensor_parallel: int, num_kv_heads: int = 4, **changes) -> KVLayout:
    fields = {"num_layers": 3, "head_dim": 4, "block_size": 2, "dtype": "bfloat16"} | changes
    return KVLayout(num_kv_heads=num_kv_heads, tensor_parallel=tensor_parallel, **fields)


def carry_out(copies: tuple[Copy, ...], sources: list[torch.Tensor], destination: torch.Tensor) -> None:
    for copy in copies:
        copy_span(sources[copy.source_rank], copy.source, destination, copy.destination)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("source_tp", DEGREES)
@pytest.mark.parametrize("destination_tp", DEGREES)
def test_every_pair_of_degrees_is_byte_exact(source_tp, destination_tp, num_kv_heads):
    source, destination = layout_of(source_tp, num_kv_heads), layout_of(destination_tp, num_kv_heads)
    sources = random_pools(source, 6, seed=1)
    wanted, before = random_pools(destination, 6, seed=1), random_pools(destination, 8, seed=2)
    for rank in range(destination_tp):
        got = before[rank].clone()
        copies = plan_copies(Move(source, destination, range(1, 3), (5, 0, 3), (2, 7, 1)), rank)
        assert tuple(copy.source_rank for copy in copies) == source_ranks(source, destination, rank)
        carry_out(copies, sources, got)
        assert got[1:, [2, 7, 1]].equal(wanted[rank][1:, [5, 0, 3]])
        assert got[0].equal(before[rank][0])
        assert got[:, [0, 3, 4, 5, 6]].equal(before[rank][:, [0, 3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("source_tp", "destination_tp", "reads_per_source_rank"),
    [(8, 8, 1), (8, 4, 0.5), (4, 8, 2), (8, 2, 0.5), (2, 8, 4), (8, 1, 0.25)],
)
def test_replicated_heads_are_read_once_each_and_spread_over_the_replicas(
    source_tp, destination_tp, reads_per_source_rank
):
    source, destination = layout_of(source_tp, num_kv_heads=2), layout_of(destination_tp, num_kv_heads=2)
    reads = Counter()
    for rank in range(destination_tp):
        copies = plan_copies(Move(source, destination, range(3), (0,), (0,)), rank)
        assert len({copy.source_rank for copy in copies}) == len(copies)
        assert sum(copy.source.num_heads for copy in copies) == destination.heads_per_rank
        reads.update(copy.source_rank for copy in copies)
    assert max(reads.values()) == max(1, reads_per_source_rank)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 4),
        ("num_kv_heads", 8),
        ("head_dim", 8),
        ("block_size", 3),
        ("dtype", "float32"),
        ("groups", GROUPS),
    ],
)
def test_layouts_that_differ_are_refused_by_field(field, value):
    changes = {"num_kv_heads": 4} | {field: value}
    with pytest.raises(Incompatible) as caught:
        plan_copies(Move(layout_of(1), layout_of(1, **changes), range(3), (0,), (0,)), 0)
    assert caught.value.field == field


def test_latents_are_exchanged_with_latents_of_one_head_only():
    for source, destination, field in (
        (layout_of(1, 1, latent=True), layout_of(1, 1), "latent"),
        (layout_of(1, 2, latent=True), layout_of(1, 2, latent=True), "num_kv_heads"),
    ):
        with pytest.raises(Incompatible) as caught:
            plan_stages(Move(source, destination, range(3), (0,), (0,)), 0)
        assert caught.value.field == field


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4000), st.sampled_from(DEGREES), st.randoms(use_true_random=False))
def test_slabs_cover_a_copy_once_within_their_size(num_blocks, slab_bytes, source_tp, chosen):
    source, destination = layout_of(source_tp), layout_of(2)
    taken, filled = (tuple(chosen.sample(range(12), num_blocks)) for _ in range(2))
    sources = random_pools(source, 12, seed=1)
    whole, cut = (random_pools(destination, 12, seed=2)[1] for _ in range(2))
    copies = plan_copies(Move(source, destination, range(3), taken, filled), 1)
    slabs = tuple(slab for copy in copies for slab in split_into_slabs(copy, source, slab_bytes))
    carry_out(copies, sources, whole)
    carry_out(slabs, sources, cut)
    assert cut.equal(whole)
    cells = Counter(
        (layer, block, head)
        for slab in slabs
        for layer in range(slab.destination.first_layer, slab.destination.first_layer + slab.destination.num_layers)
        for block in slab.destination.blocks
        for head in range(slab.destination.first_head, slab.destination.first_head + slab.destination.num_heads)
    )
    assert set(cells.values()) == {1} and len(cells) == 3 * num_blocks * 2
    for slab in slabs:
        one_cell = slab.source.num_layers == len(slab.source.blocks) == 1
        assert one_cell or span_bytes(sources[slab.source_rank], slab.source) <= slab_bytes


def test_slabs_are_as_large_as_allowed():
    layout = layout_of(1)  # a block of all layers has 3 * 2 * 4 heads * 2 * 4 * 2 bytes = 384
    (copy,) = plan_copies(Move(layout, layout, range(3), tuple(range(10)), tuple(range(10))), 0)
    assert [len(s.source.blocks) for s in split_into_slabs(copy, layout, 4 * 384)] == [4, 4, 2]
    by_layers = split_into_slabs(copy, layout, 300)
    assert [(s.source.blocks, s.source.first_layer, s.source.num_layers) for s in by_layers[:2]] == [
        ((0,), 0, 2),
        ((0,), 2, 1),
    ]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DEGREES), st.sampled_from(DEGREES), st.sampled_from(DEGREES), st.sampled_from([2, 4, 8]))
def test_every_head_is_filled_once_from_a_rank_that_holds_it_and_its_replicas_share_the_load(
    source_tp, destination_tp, num_kv_heads, destination_size
):
    source, destination = (
        layout_of(source_tp, num_kv_heads, block_size=4),
        layout_of(destination_tp, num_kv_heads, block_size=destination_size),
    )
    source_blocks, destination_blocks = tuple(range(9, 5, -1)), tuple(range(16 // destination_size))
    reads = Counter({(head, rank): 0 for rank in range(source_tp) for head in source.heads_of_rank(rank)})
    for rank in range(destination_tp):
        filled = Counter()
        for copy in plan_copies(Move(source, destination, range(3), source_blocks, destination_blocks), rank):
            taken_heads = source.heads_of_rank(copy.source_rank)[copy.source.first_head :][: copy.source.num_heads]
            filled_heads = destination.heads_of_rank(rank)[copy.destination.first_head :][: copy.destination.num_heads]
            assert taken_heads == filled_heads and len(filled_heads) == copy.destination.num_heads
            filled.update((head, piece) for head in filled_heads for piece in copy.destination.blocks)
            reads.update((head, copy.source_rank) for head in taken_heads)
        num_pieces = 16 // min(4, destination_size)
        heads = destination.heads_of_rank(rank)
        assert filled == Counter((head, piece) for head in heads for piece in range(num_pieces))
    for head in range(num_kv_heads):
        loads = [count for (read, _), count in reads.items() if read == head]
        assert max(loads) - min(loads) <= 1 and sum(loads) == max(1, destination_tp // num_kv_heads)


LATENT = {"num_kv_heads": 1, "latent": True}


@pytest.mark.parametrize("source_tp", DEGREES)
@pytest.mark.parametrize("destination_tp", DEGREES)
@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (2, 4)])
def test_latents_cross_once_and_reach_every_rank(source_tp, destination_tp, sizes):
    source, destination = (
        layout_of(degree, block_size=size, **LATENT)
        for degree, size in zip((source_tp, destination_tp), sizes, strict=True)
    )
    sources, pools = random_pools(source, 20, seed=1), random_pools(destination, 20, seed=2)
    num_tokens = 32
    taken, filled = (tuple(range(2, 2 + num_tokens // size)) for size in sizes)
    stages = [plan_stages(Move(source, destination, range(3), taken, filled), rank) for rank in range(destination_tp)]
    crossed = Counter(
        (copy.source_rank, piece) for stage in stages for copy in stage.from_source for piece in copy.source.blocks
    )
    assert len({piece for _, piece in crossed}) == len(crossed) == num_tokens // 2, "each piece crosses once"
    sent = Counter(rank for rank, _ in crossed.elements())
    assert set(sent.values()) == {num_tokens // 2 // source_tp} and len(sent) == source_tp
    handed_on = Counter()
    for rank, stage in enumerate(stages):
        assert {copy.source_rank for copy in stage.from_source} == set(source_ranks(source, destination, rank))
        assert rank not in {copy.source_rank for copy in stage.from_siblings}
        for copy in stage.from_siblings:
            handed_on[copy.source_rank] += len(copy.source.blocks)
    assert set(handed_on.values()) <= {(destination_tp - 1) * num_tokens // 2 // destination_tp}
    for rank, stage in enumerate(stages):
        carry_out(stage.from_source, sources, pools[rank])
    for rank, stage in enumerate(stages):
        carry_out(stage.from_siblings, pools, pools[rank])
    for rank in range(destination_tp):
        got, wanted = (
            pool[:, list(blocks)].transpose(1, 3).flatten(1, 2).transpose(1, 2).reshape(3, -1)
            for pool, blocks in ((pools[rank], filled), (sources[0], taken))
        )
        assert got.equal(wanted)
        assert pools[rank][:, :2].equal(random_pools(destination, 20, seed=2)[rank][:, :2])


def test_small_announcements_of_latents_are_shared_as_evenly_as_large_ones():
    source, destination = layout_of(2, **LATENT), layout_of(4, **LATENT)
    received, sent = Counter(), Counter()
    for block in range(16):
        for rank in range(4):
            tokens = range(2 * block, 2 * block + 2)
            for copy in plan_stages(Move(source, destination, range(3), (block,), (block,), tokens), rank).from_source:
                received[rank] += 1
                sent[copy.source_rank] += 1
    assert received == dict.fromkeys(range(4), 4) and sent == {0: 8, 1: 8}


def test_heads_have_no_second_stage():
    for rank in range(4):
        stages = plan_stages(Move(layout_of(2), layout_of(4), range(3), (1, 2), (3, 4)), rank)
        assert stages.from_source == plan_copies(Move(layout_of(2), layout_of(4), range(3), (1, 2), (3, 4)), rank)
        assert stages.from_siblings == ()

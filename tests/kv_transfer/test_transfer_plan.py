"""Plans between all tensor parallel degrees, carried out on tensors, give the bytes of the full-heads pool."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fleet import random_pools

from core.errors import Incompatible
from core.kv_layout import KVLayout
from core.messages.to_rank import Copy
from kv_transfer.plan import plan_copies, split_into_slabs
from kv_transfer.spans import copy_span, span_bytes

DEGREES = [1, 2, 4, 8]


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
        carry_out(plan_copies(source, destination, rank, 1, 2, (5, 0, 3), (2, 7, 1)), sources, got)
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
        copies = plan_copies(source, destination, rank, 0, 3, (0,), (0,))
        assert len({copy.source_rank for copy in copies}) == len(copies)
        assert sum(copy.source.num_heads for copy in copies) == destination.heads_per_rank
        reads.update(copy.source_rank for copy in copies)
    assert max(reads.values()) == max(1, reads_per_source_rank)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 4), ("num_kv_heads", 8), ("head_dim", 8), ("block_size", 4), ("dtype", "float32")],
)
def test_layouts_that_differ_are_refused_by_field(field, value):
    changes = {"num_kv_heads": 4} | {field: value}
    with pytest.raises(Incompatible) as caught:
        plan_copies(layout_of(1), layout_of(1, **changes), 0, 0, 3, (0,), (0,))
    assert caught.value.field == field


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4000), st.sampled_from(DEGREES), st.randoms(use_true_random=False))
def test_slabs_cover_a_copy_once_within_their_size(num_blocks, slab_bytes, source_tp, chosen):
    source, destination = layout_of(source_tp), layout_of(2)
    taken, filled = (tuple(chosen.sample(range(12), num_blocks)) for _ in range(2))
    sources = random_pools(source, 12, seed=1)
    whole, cut = (random_pools(destination, 12, seed=2)[1] for _ in range(2))
    copies = plan_copies(source, destination, 1, 0, 3, taken, filled)
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
    (copy,) = plan_copies(layout, layout, 0, 0, 3, tuple(range(10)), tuple(range(10)))
    assert [len(s.source.blocks) for s in split_into_slabs(copy, layout, 4 * 384)] == [4, 4, 2]
    by_layers = split_into_slabs(copy, layout, 300)
    assert [(s.source.blocks, s.source.first_layer, s.source.num_layers) for s in by_layers[:2]] == [
        ((0,), 0, 2),
        ((0,), 2, 1),
    ]

"""Plans between replicas of any two splits into stages and parts, carried out on tensors, give every rank its bytes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fleet import random_pools

from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from kv_transfer.plan import Move, plan_copies, plan_stages, source_ranks
from kv_transfer.spans import copy_span, require_inside, require_same_shape

HEADS = KVLayout(7, 4, 4, 2, "bfloat16", 1)
KINDS = {
    "heads": HEADS,
    "few heads": replace(HEADS, num_kv_heads=2),
    "latents": KVLayout(7, 1, 8, 2, "bfloat16", 1, latent=True),
    "groups": replace(HEADS, groups=(KVGroup((2, 5)), KVGroup((0, 3, 6), 20), KVGroup((1, 4), 20))),
}
DEGREES = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 5, 7]))  # tensor, pipeline parallel
BLOCKS = (5, 0, 3), (2, 7, 1)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*KINDS]), DEGREES, DEGREES, st.data())
def test_every_rank_gets_its_bytes_and_no_others(kind, source_degrees, destination_degrees, data):
    source, destination = (
        replace(KINDS[kind], tensor_parallel=degrees[0], pipeline_parallel=degrees[1])
        for degrees in (source_degrees, destination_degrees)
    )
    group = data.draw(st.integers(0, len(source.kv_groups) - 1))
    size = len(source.kv_groups[group].layers)
    first = data.draw(st.integers(0, size - 1))
    places = range(first, data.draw(st.integers(first + 1, size)))
    move = Move(source, destination, places, *BLOCKS, group=group)
    ranks = range(destination.num_ranks)
    sources, wanted = random_pools(source, 6, 1, group), random_pools(destination, 6, 1, group)
    pools, before = random_pools(destination, 8, 2, group), random_pools(destination, 8, 2, group)
    plans = [plan_stages(move, rank) for rank in ranks]
    for from_pools, stage in ((sources, "from_source"), (pools, "from_siblings")):
        for rank in ranks:
            for copy in getattr(plans[rank], stage):
                require_inside(from_pools[copy.source_rank], copy.source)
                require_inside(pools[rank], copy.destination)
                require_same_shape(copy)
                copy_span(from_pools[copy.source_rank], copy.source, pools[rank], copy.destination)
    for rank in ranks:
        held = destination.places_of_stage(destination.stage_of(rank), group)
        for place, number in enumerate(held):
            if number in places:
                before[rank][place, list(BLOCKS[1])] = wanted[rank][place, list(BLOCKS[0])]
        assert pools[rank].equal(before[rank])
        assert {copy.source_rank for copy in plans[rank].from_source} <= set(source_ranks(source, destination, rank))


def test_a_head_of_a_layer_is_read_once_and_a_rank_without_the_layers_reads_nothing():
    source, destination = replace(HEADS, pipeline_parallel=2), replace(HEADS, tensor_parallel=2, pipeline_parallel=3)
    move = Move(source, destination, range(3, 6), (0,), (0,))
    read = [
        [(copy.source_rank, copy.source.first_layer, copy.destination.first_layer) for copy in plan_copies(move, rank)]
        for rank in range(6)
    ]
    # layers 0 1 2 3 | 4 5 6 there; 0 1 2 | 3 4 | 5 6 here, each stage of two parts
    assert read == [[], [], [(0, 3, 0), (1, 0, 1)], [(0, 3, 0), (1, 0, 1)], [(1, 1, 0)], [(1, 1, 0)]]


@pytest.mark.parametrize("kind", [*KINDS])
def test_channels_join_ranks_that_have_layers_in_common(kind):
    source, destination = replace(KINDS[kind], pipeline_parallel=2), replace(KINDS[kind], pipeline_parallel=3)
    # 0 1 2 3 | 4 5 6 there; 0 1 2 | 3 4 | 5 6 here
    assert [source_ranks(source, destination, rank) for rank in range(3)] == [(0,), (0, 1), (1,)]

"""Which layers share blocks, which blocks a sequence needs, and how deep a cached prefix can be used."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma3TextConfig, GptOssConfig, MistralConfig, Phi3Config, Qwen2Config

from core.block_hash import hash_blocks, in_group
from core.kv_groups import MOST_PADDING, KVGroup, deepest_prefix, group_layers
from core.kv_layout import KVLayout
from core.layer_windows import layer_windows
from core.model_geometry import geometry_of

PLAIN = KVLayout(4, 2, 8, 16, "float32", 1)
MIXED = replace(PLAIN, groups=(KVGroup((1, 3)), KVGroup((0, 2), 40)))
SMALL_WINDOWS = st.lists(st.sampled_from([None, None, 3, 7]), min_size=1, max_size=40)


def shape_of(windows: list[int | None]) -> list[tuple[int | None, int]]:
    return [(group.window, len(group.layers)) for group in group_layers(windows)]


def every(period: int, num_layers: int, window: int = 1024) -> list[int | None]:
    """Local layers, and a global one at the end of each period."""
    return [window if (layer + 1) % period else None for layer in range(num_layers)]


def test_groups_of_published_models():
    assert shape_of([None] * 32) == [(None, 32)]
    assert shape_of([4096] * 32) == [(4096, 32)], "Mistral 7B"
    assert shape_of(every(2, 26)) == [(None, 13), (1024, 13)], "Gemma 2 2B"
    assert shape_of(every(2, 24, 128)) == [(None, 12), (128, 12)], "gpt-oss 20B"
    assert shape_of(every(6, 26)) == [(None, 4)] + [(1024, 4)] * 4 + [(1024, 3)] * 2, "Gemma 3 1B: 2 of 28 places empty"
    assert shape_of(every(6, 48)) == [(None, 8)] + [(1024, 8)] * 5, "Gemma 3 12B"
    assert shape_of(every(6, 62)) == [(None, 10)] + [(1024, 11)] * 2 + [(1024, 10)] * 3, "Gemma 3 27B: 4 of 66"


@given(SMALL_WINDOWS)
def test_every_layer_has_one_place_and_few_places_are_empty(windows):
    groups = group_layers(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)
    assert all(list(group.layers) == sorted(group.layers) for group in groups)
    num_places = max(len(group.layers) for group in groups)
    empty = {None: 0, 3: 0, 7: 0}
    for group in groups:
        empty[group.window] += num_places - len(group.layers)
    num_full = sum(group.window is None for group in groups)
    assert sum(empty.values()) <= MOST_PADDING * num_places * len(groups)
    assert empty[None] <= MOST_PADDING * num_places * num_full
    assert [group.window is not None for group in groups] == sorted(group.window is not None for group in groups)


@given(SMALL_WINDOWS, st.integers(1, 6))
def test_every_stage_of_a_pipeline_has_its_share_of_every_group(windows, stages):
    layout = replace(PLAIN, num_layers=len(windows), groups=group_layers(windows), pipeline_parallel=stages)
    for stage in range(stages):
        layers = layout.layers_of_stage(stage)
        for window in {*windows}:
            sizes = [len(group.layers) for group in layout.groups_of_stage(stage) if group.window == window]
            assert sum(sizes) == sum(windows[layer] == window for layer in layers)
            assert max(sizes) - min(sizes) <= 1


def test_a_stage_of_gemma_3_27b_holds_half_of_the_kv():
    whole = replace(PLAIN, num_layers=62, groups=group_layers(every(6, 62)))
    assert (whole.places_per_rank, replace(whole, pipeline_parallel=2).places_per_rank) == (11, 6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Gemma2Config, {}),
        (Gemma3TextConfig, {}),
        (GptOssConfig, {}),
        (MistralConfig, {}),
        (MistralConfig, {"sliding_window": None}),
        (Phi3Config, {"sliding_window": 2047}),
        (Qwen2Config, {}),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 20}),
    ],
)
def test_a_bare_config_means_the_windows_that_transformers_fills_in(tmp_path, kind, changes):
    config = kind(num_hidden_layers=26, max_position_embeddings=1 << 17, **changes)
    filled = json.loads(config.to_json_string(use_diff=False))
    types = filled.get("layer_types") or ["sliding_attention"] * 26
    expected = tuple(filled["sliding_window"] if name == "sliding_attention" else None for name in types)
    assert layer_windows(filled) == expected
    bare = {name: filled[name] for name in ("model_type", "num_hidden_layers", "max_position_embeddings")}
    assert layer_windows(bare | changes) == expected


def test_a_window_as_long_as_the_context_is_none():
    config = {"model_type": "phi3", "num_hidden_layers": 2, "sliding_window": 262144, "max_position_embeddings": 131072}
    assert layer_windows(config) == (None, None)
    assert layer_windows(config | {"sliding_window": 2047}) == (2047, 2047)


def test_a_layout_without_windows_says_what_it_always_said():
    sizes = {
        "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 8, "max_position_embeddings": 512,
    }  # fmt: skip
    assert geometry_of({"model_type": "llama"} | sizes).kv_layout(1, 16) == PLAIN
    assert (PLAIN.num_places, PLAIN.block_bytes_per_rank) == (4, 4 * 2 * 2 * 16 * 8 * 4)
    gemma = geometry_of({"model_type": "gemma2", "sliding_window": 40, "head_dim": 8} | sizes).kv_layout(1, 16)
    assert gemma == MIXED
    assert (gemma.num_places, gemma.block_bytes_per_rank) == (2, PLAIN.block_bytes_per_rank // 2)


@given(
    window=st.integers(1, 50), block_size=st.sampled_from([1, 2, 16]), length=st.integers(1, 300),
    budget=st.integers(1, 70),
)  # fmt: skip
def test_blocks_of_a_window_are_those_that_its_tokens_see(window, block_size, length, budget):
    group, computed = KVGroup((0,), window), 0
    while computed < length:
        end = min(length, computed + budget)
        seen = {p // block_size for q in range(computed, end) for p in range(max(0, q - window + 1), q + 1)}
        assert group.first_needed(computed, block_size) == min(seen)
        assert max(seen) - min(seen) + 1 <= group.most_at_once(budget, block_size)
        computed = end


def test_blocks_that_a_sequence_holds_and_lacks():
    # 1,000 tokens are 63 blocks; 39 tokens behind a position and a step lie in 5 blocks, with 64 tokens a step in 8
    assert MIXED.num_blocks_held(1000, 1) == 63 + 4
    assert MIXED.num_blocks_held(1000, 64) == 63 + 8
    assert MIXED.num_blocks_held(20, 64) == 2 + 2 and PLAIN.num_blocks_held(1000, 64) == 63
    assert MIXED.num_blocks_missing(0, 1000) == 63 + 3, "positions from 961 on: blocks 60, 61 and 62"
    assert MIXED.num_blocks_missing(61, 1000) == 2 + 2 and MIXED.num_blocks_missing(63, 1000) == 0
    assert PLAIN.num_blocks_missing(10, 1000) == 53


@given(num_blocks=st.integers(1, 80), at_once=st.integers(1, 99), limit=st.integers(1, 2000))
def test_the_longest_sequence_fits_and_a_longer_one_does_not(num_blocks, at_once, limit):
    for layout in (PLAIN, MIXED, replace(PLAIN, groups=(KVGroup((0, 1, 2, 3), 40),))):
        longest = layout.longest_within(num_blocks, at_once, limit)
        assert layout.num_blocks_held(longest, at_once) <= num_blocks
        assert longest == limit or layout.num_blocks_held(longest + 1, at_once) > num_blocks
    assert PLAIN.longest_within(num_blocks, at_once, limit) == min(limit, num_blocks * 16)


@given(st.data())
def test_a_prefix_is_as_deep_as_every_group_can_go_on_behind_it(data):
    reaches = data.draw(st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=3))
    hashes = hash_blocks(range(8), 1)
    cached = data.draw(st.sets(st.tuples(st.integers(0, 7), st.integers(0, len(reaches) - 1))))
    cached |= {(block, number) for block in range(data.draw(st.integers(0, 8))) for number in range(len(reaches))}
    keys = {in_group(hashes[block], number) for block, number in cached}

    def can_go_on(depth: int) -> bool:
        return all(
            (block, number) in cached
            for number, reach in enumerate(reaches)
            for block in range(0 if reach is None else max(0, depth - reach), depth)
        )

    assert deepest_prefix(reaches, hashes, keys.__contains__) == max(filter(can_go_on, range(9)))


def test_a_window_needs_its_last_blocks_alone():
    hashes = hash_blocks(range(16), 2)
    (full, windowed), last = MIXED.reaches, {in_group(hashes[i], 1) for i in (5, 6, 7)}
    assert (full, windowed) == (None, 3)
    everything = {*hashes, *last}
    assert deepest_prefix(MIXED.reaches, hashes, everything.__contains__) == 8
    assert deepest_prefix(MIXED.reaches, hashes, (everything - {hashes[7]}).__contains__) == 0
    assert deepest_prefix(MIXED.reaches, hashes, (everything - {hashes[0]}).__contains__) == 0
    assert deepest_prefix((None,), hashes, set(hashes[:5]).__contains__) == 5

"""Equal content has one digest wherever it lies; a changed, moved or lost bit has another."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.messages.to_rank import Span
from kv_transfer import digest as module
from kv_transfer.digest import digest
from kv_transfer.spans import copy_span, gather, span_bytes

SPAN = Span(1, 2, (7, 2, 5), 1, 2)


def pool_of(seed: int, block_size: int = 8, dtype: torch.dtype = torch.bfloat16, planes: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, planes, 4, block_size, 6, generator=generator).to(dtype)


def by_the_formula(pool: torch.Tensor, span: Span) -> int:
    """Of a span that is one chunk, in Python's integers."""

    def key(index: int) -> int:
        mixed = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return (mixed ^ mixed >> 31) | 1

    slab = torch.empty(span_bytes(pool, span), dtype=torch.uint8)
    gather(pool, span, slab)
    words = slab.view(torch.int32).tolist()
    return key(2**32) * sum(key(index) * word for index, word in enumerate(words)) % 2**64


def test_it_is_what_the_formula_says():
    assert digest(pool_of(1), SPAN) == by_the_formula(pool_of(1), SPAN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("sizes", [(8, 8, 0), (8, 16, 8), (16, 8, 8), (16, 16, 4)])
def test_the_same_content_elsewhere_has_the_same_digest(dtype, planes, sizes):
    source_size, destination_size, piece = sizes
    source, destination = pool_of(1, source_size, dtype, planes), pool_of(2, destination_size, dtype, planes)
    taken, filled = replace(SPAN, block_tokens=piece), Span(1, 2, (0, 6, 1), 2, 2, piece)
    assert digest(source, taken) != digest(destination, filled)
    copy_span(source, taken, destination, filled)
    assert digest(source, taken) == digest(destination, filled)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 2 * 3 * 2 * 2 * 8 * 6 * 16 - 1), min_size=1, max_size=4))
def test_flipped_bits_change_it(bits):
    pool, whole = pool_of(1), Span(0, 2, (0, 1, 2), 0, 4)
    before = digest(pool, whole)
    flat = pool[:2, :3].contiguous().view(torch.uint8).flatten()
    for bit in bits:
        flat[bit // 8] ^= 1 << (bit % 8)
    pool[:2, :3] = flat.view(torch.bfloat16).view(2, 3, 2, 4, 8, 6)
    assert digest(pool, whole) != before


def test_every_pair_of_flipped_signs_changes_it():
    """Sums of products of wide words would not see two flipped top bits."""
    pool, span = torch.ones(1, 1, 2, 1, 4, 6, dtype=torch.bfloat16), Span(0, 1, (0,), 0, 1)
    before, numbers, seen = digest(pool, span), pool.view(-1), set()
    for first in range(len(numbers)):
        for second in range(first):
            numbers[[first, second]] = -1
            seen.add(digest(pool, span))
            numbers.fill_(1)
    assert before not in seen and len(seen) > 1000


def test_swapped_blocks_planes_and_zeroed_runs_change_it():
    pool = pool_of(1)
    before = digest(pool, SPAN)
    swapped, planes, zeroed, elsewhere = (pool.clone() for _ in range(4))
    swapped[:, [7, 2]] = pool[:, [2, 7]]
    planes[:, 2] = pool[:, 2].flip(1)
    zeroed[1, 5, 1, 2, 4:6] = 0
    elsewhere[:, [0, 1, 3, 4, 6]] = 0
    assert len({before, digest(swapped, SPAN), digest(planes, SPAN), digest(zeroed, SPAN)}) == 4
    assert digest(pool, replace(SPAN, blocks=(2, 7, 5))) == digest(swapped, SPAN)
    assert digest(elsewhere, SPAN) == before


def test_large_spans_are_digested_in_steps(monkeypatch):
    """Parts of every size: several layers at a time, a part of a layer's pieces, one piece of many chunks."""
    monkeypatch.setattr(module, "_STEP_BYTES", 1 << 18)
    chosen = random.Random(1)
    for shape in ((12, 8, 2, 2, 16, 64), (2, 40, 2, 4, 16, 64), (2, 3, 2, 8, 64, 256)):
        pool = torch.randint(0, 256, shape, dtype=torch.uint8)
        span = Span(0, shape[0], tuple(range(shape[1] - 1)), 0, shape[3])
        steps = list(module._steps(pool, span))
        assert len(steps) > 1 and sum(span_bytes(pool, step) for step in steps) == span_bytes(pool, span)
        before = digest(pool, span)
        for _ in range(20):
            place = tuple(chosen.randrange(size - (axis == 1)) for axis, size in enumerate(shape))
            pool[place] ^= 16
            assert digest(pool, span) != before
            pool[place] ^= 16
        assert digest(pool, span) == before


def test_it_compares_what_two_chunks_hold_not_only_their_sums():
    pool = torch.zeros(1, 4, 2, 4, 64, 128, dtype=torch.float32)  # a block of two chunks
    pool[0, 0, 0, 0, 0, 0], pool[0, 1, 0, 0, 0, 0] = 1.0, 2.0
    span = Span(0, 1, (0, 1), 0, 4)
    assert digest(pool, span) != digest(pool, replace(span, blocks=(1, 0)))

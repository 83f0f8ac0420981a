"""Gather and scatter against plain indexing, for every dtype and head range."""

import pytest
import torch

from core.errors import TransferFailed
from core.messages.to_rank import Span
from kv_transfer.host_copy import bytes_of, runs
from kv_transfer.spans import copy_span, gather, require_inside, scatter, span_bytes

SPANS = [
    Span(0, 3, (0,), 0, 4),
    Span(1, 2, (7, 2, 5), 0, 4),
    Span(2, 1, (6, 7), 1, 2),
    Span(0, 3, (3, 1), 3, 1),
]


def pool_of(seed: int, dtype: torch.dtype, block_size: int = 4, head_dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, 2, 4, block_size, head_dim, generator=generator).to(dtype)


def part(pool: torch.Tensor, span: Span) -> torch.Tensor:
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    return pool[layers, list(span.blocks)][:, :, :, span.first_head : span.first_head + span.num_heads]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim"),
    [(torch.bfloat16, 4, 8), (torch.float32, 4, 8), (torch.float16, 1, 3), (torch.float16, 2, 3), (torch.uint8, 1, 3)],
)
def test_a_slab_holds_the_span_in_order_and_puts_it_back_elsewhere(span, dtype, block_size, head_dim):
    source, destination = pool_of(1, dtype, block_size, head_dim), pool_of(2, dtype, block_size, head_dim)
    slab = torch.empty(span_bytes(source, span), dtype=torch.uint8)
    gather(source, span, slab)
    assert slab.equal(part(source, span).contiguous().view(torch.uint8).flatten())
    expected = destination.clone()
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    heads = slice(span.first_head, span.first_head + span.num_heads)
    for block in span.blocks:
        expected[layers, block, :, heads] = source[layers, block, :, heads]
    scatter(slab, destination, span)
    assert destination.equal(expected)


def test_a_span_moves_inside_one_pool_even_onto_itself():
    pool = pool_of(1, torch.bfloat16)
    before = pool.clone()
    assert copy_span(pool, Span(0, 3, (0, 1), 0, 4), pool, Span(0, 3, (1, 0), 0, 4)) == before[:, :2].numel() * 2
    assert pool[:, 0].equal(before[:, 1]) and pool[:, 1].equal(before[:, 0])
    assert pool[:, 2:].equal(before[:, 2:])


@pytest.mark.parametrize(
    "span",
    [
        Span(0, 4, (0,), 0, 4),
        Span(-1, 1, (0,), 0, 4),
        Span(0, 0, (0,), 0, 4),
        Span(0, 1, (8,), 0, 4),
        Span(0, 1, (-1,), 0, 4),
        Span(0, 1, (), 0, 4),
        Span(0, 1, (0,), 3, 2),
    ],
)
def test_a_span_beyond_the_pool_is_refused(span):
    with pytest.raises(TransferFailed, match="outside"):
        require_inside(pool_of(1, torch.bfloat16), span)


@pytest.mark.parametrize("block_size", [4, 1024])
def test_a_span_moves_between_pools(block_size):
    source, destination = pool_of(1, torch.bfloat16, block_size), pool_of(2, torch.bfloat16, block_size)
    expected = destination.clone()
    for taken, filled in ((6, 0), (2, 5)):
        expected[1:3, filled, :, 1:3] = source[1:3, taken, :, 2:4]
    num_bytes = copy_span(source, Span(1, 2, (6, 2), 2, 2), destination, Span(1, 2, (0, 5), 1, 2))
    assert num_bytes == 2 * 2 * 2 * 2 * block_size * 8 * 2
    assert destination.equal(expected)


@pytest.mark.parametrize("span", [*SPANS, Span(0, 3, (2, 3, 4, 6), 0, 4), Span(1, 2, (5, 6, 7), 1, 3)])
def test_the_runs_of_a_span_are_its_bytes_in_the_order_of_a_slab(span):
    pool = pool_of(1, torch.bfloat16)
    slab = torch.empty(span_bytes(pool, span), dtype=torch.uint8)
    gather(pool, span, slab)
    assert b"".join(runs(bytes_of(pool), span)) == slab.numpy().tobytes()


def test_neighbouring_blocks_make_one_run_per_layer_and_writing_a_run_writes_the_pool():
    pool = pool_of(1, torch.bfloat16)
    held = bytes_of(pool)
    assert len(runs(held, Span(0, 3, (2, 3, 4), 0, 4))) == 3
    assert len(runs(held, Span(0, 3, (2, 3, 5, 6), 0, 4))) == 3 * 2
    assert len(runs(held, Span(0, 3, (2, 3, 4), 0, 2))) == 3 * 3 * 2
    (run,) = runs(held, Span(1, 1, (5,), 0, 4))
    run[:] = bytes(len(run))
    assert not pool[1, 5].any() and pool[1, 4].any() and pool[1, 6].any()

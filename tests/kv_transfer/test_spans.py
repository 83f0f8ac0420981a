"""Gather and scatter against plain indexing, for every dtype and head range."""

from dataclasses import replace

import pytest
import torch

from core.errors import TransferFailed
from core.messages.to_rank import Copy, Span
from kv_transfer import host_copy
from kv_transfer.runs import runs_of
from kv_transfer.spans import copy_span, gather, require_inside, require_same_shape, scatter, span_bytes
from kv_transfer.stream_copy import load_stream_copy

SPANS = [
    Span(0, 3, (0,), 0, 4),
    Span(1, 2, (7, 2, 5), 0, 4),
    Span(2, 1, (6, 7), 1, 2),
    Span(0, 3, (3, 1), 3, 1),
]


@pytest.fixture(params=["streamed", "by NumPy"], autouse=True)
def way_to_copy(request, monkeypatch):
    """Slabs of any size are copied past the caches, or none is."""
    if request.param == "streamed":
        if load_stream_copy() is None:
            pytest.skip("nothing here compiles it, or the processor has no such writes")
        monkeypatch.setattr(host_copy, "LEAST_BYTES", 0)
    else:
        monkeypatch.setattr(host_copy, "load_stream_copy", lambda: None)


def pool_of(seed: int, dtype: torch.dtype, block_size: int = 4, head_dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, 2, 4, block_size, head_dim, generator=generator).to(dtype)


def part(pool: torch.Tensor, span: Span) -> torch.Tensor:
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    return pool[layers, list(span.blocks)][:, :, :, span.first_head : span.first_head + span.num_heads]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim"),
    [
        (torch.bfloat16, 4, 8),
        (torch.float32, 4, 8),
        (torch.float16, 1, 3),
        (torch.float16, 2, 3),
        (torch.uint8, 1, 3),
        (torch.uint8, 5, 67),
    ],
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
        Span(0, 1, (16,), 0, 4, 2),
        Span(0, 1, (0,), 0, 4, 3),
        Span(0, 1, (0,), 0, 4, 8),
        Span(0, 1, (0,), 0, 4, -2),
    ],
)
def test_a_span_beyond_the_pool_is_refused(span):
    with pytest.raises(TransferFailed, match="outside"):
        require_inside(pool_of(1, torch.bfloat16), span)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("block_size", "piece"), [(4, 2), (4, 1), (8, 4), (6, 3)])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 8), (torch.float32, 3), (torch.float8_e4m3fn, 5)])
def test_a_span_of_pieces_is_that_of_a_pool_whose_blocks_are_the_pieces(dtype, head_dim, block_size, piece, planes):
    coarse, other = (
        torch.randn(3, 4, planes, 4, block_size, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for seed in (1, 2)
    )
    parts = block_size // piece
    span = Span(1, 2, (2 * parts - 1, 0, 3 * parts), 1, 2, piece)
    fine, fine_span = in_pieces(coarse, piece), replace(span, block_tokens=0)
    slab, expected = (torch.empty(span_bytes(coarse, span), dtype=torch.uint8) for _ in range(2))
    gather(coarse, span, slab)
    gather(fine, fine_span, expected)
    assert slab.equal(expected)
    elsewhere = Span(0, 2, (1, 2 * parts, parts), 2, 2, piece)
    scatter(slab, other, elsewhere)
    after = in_pieces(other, piece)
    filled = part(after, replace(elsewhere, block_tokens=0))
    assert same_bytes(filled, part(fine, fine_span))
    assert span_bytes(coarse, span) == 2 * 3 * planes * 2 * piece * head_dim * dtype.itemsize


def in_pieces(pool: torch.Tensor, piece: int) -> torch.Tensor:
    """The same content in blocks of `piece` tokens."""
    layers, blocks, planes, heads, block_size, head_dim = pool.shape
    cut = pool.view(layers, blocks, planes, heads, block_size // piece, piece, head_dim)
    return cut.permute(0, 1, 4, 2, 3, 5, 6).reshape(layers, -1, planes, heads, piece, head_dim)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("source_size", "destination_size", "piece"), [(8, 4, 4), (4, 8, 4), (8, 8, 2)])
@pytest.mark.parametrize("head_dim", [8, 2048])  # below and above the size from which pieces are copied one by one
def test_pieces_move_between_pools_of_unlike_block_sizes(source_size, destination_size, piece, head_dim):
    source, destination = (
        pool_of(1, torch.bfloat16, source_size, head_dim),
        pool_of(2, torch.bfloat16, destination_size, head_dim),
    )
    expected = in_pieces(destination, piece)
    for taken, filled in ((5, 0), (2, 7)):
        expected[1:3, filled, :, 1:3] = in_pieces(source, piece)[1:3, taken, :, 2:4]
    copy_span(source, Span(1, 2, (5, 2), 2, 2, piece), destination, Span(1, 2, (0, 7), 1, 2, piece))
    assert in_pieces(destination, piece).equal(expected)


def test_a_copy_between_spans_of_unequal_size_is_refused():
    with pytest.raises(TransferFailed, match="unequal size"):
        copy_span(
            pool_of(1, torch.float16, 4), Span(0, 3, (0,), 0, 4), pool_of(2, torch.float16, 8), Span(0, 3, (0,), 0, 4)
        )
    with pytest.raises(TransferFailed, match="unequal shape"):
        require_same_shape(Copy(0, Span(0, 3, (0,), 0, 4, 4), Span(0, 3, (0,), 0, 4)))


def test_pieces_name_the_blocks_that_they_lie_in():
    assert Span(0, 1, (5, 4, 0, 1, 9), 0, 1, 16).physical_blocks(32) == (2, 0, 4)
    assert Span(0, 1, (5, 4), 0, 1).physical_blocks(32) == (5, 4)


@pytest.mark.parametrize("block_size", [4, 1024])
def test_a_span_moves_between_pools(block_size):
    source, destination = pool_of(1, torch.bfloat16, block_size), pool_of(2, torch.bfloat16, block_size)
    expected = destination.clone()
    for taken, filled in ((6, 0), (2, 5)):
        expected[1:3, filled, :, 1:3] = source[1:3, taken, :, 2:4]
    num_bytes = copy_span(source, Span(1, 2, (6, 2), 2, 2), destination, Span(1, 2, (0, 5), 1, 2))
    assert num_bytes == 2 * 2 * 2 * 2 * block_size * 8 * 2
    assert destination.equal(expected)


def test_all_heads_of_one_pool_are_some_of_another():
    source, destination = pool_of(1, torch.bfloat16), torch.zeros(3, 8, 2, 6, 4, 8, dtype=torch.bfloat16)
    copy_span(source, Span(0, 3, (1, 2, 6), 0, 4), destination, Span(0, 3, (5, 6, 7), 2, 4))
    assert destination[:, 5:, :, 2:].equal(source[:, [1, 2, 6]])
    assert not destination[:, :5].any() and not destination[:, :, :, :2].any()


@pytest.mark.parametrize("change", [-64, 64, 2**20])
def test_a_slab_of_another_size_is_refused(change):
    """A streamed one would go on beyond the end of one of the two."""
    pool, span = pool_of(1, torch.bfloat16), Span(0, 3, (1, 2, 6), 0, 4)
    slab = torch.zeros(span_bytes(pool, span) + change, dtype=torch.uint8)
    with pytest.raises((TransferFailed, ValueError)):
        gather(pool, span, slab)
    with pytest.raises((TransferFailed, ValueError)):
        scatter(slab, pool, span)
    assert pool.equal(pool_of(1, torch.bfloat16)) and not slab.any()


def test_spans_of_equal_size_and_unlike_shape_are_refused():
    source, destination = pool_of(1, torch.bfloat16), torch.zeros(3, 8, 2, 6, 4, 8, dtype=torch.bfloat16)
    with pytest.raises((TransferFailed, ValueError)):
        copy_span(source, Span(0, 3, (1, 2), 0, 2), destination, Span(0, 2, (1, 2), 0, 3))
    assert not destination.any()


@pytest.mark.parametrize(
    "span",
    [*SPANS, Span(0, 3, (2, 3, 4, 6), 0, 4), Span(1, 2, (5, 6, 7), 1, 3), Span(1, 2, (5, 6, 0), 1, 2, 2)],
)
def test_the_runs_of_a_span_are_its_bytes_in_the_order_of_a_slab(span):
    pool = pool_of(1, torch.bfloat16)
    slab = torch.empty(span_bytes(pool, span), dtype=torch.uint8)
    gather(pool, span, slab)
    assert b"".join(views(pool, span)) == slab.numpy().tobytes()


def views(pool: torch.Tensor, span: Span) -> list[memoryview]:
    runs, held = runs_of(pool, span), pool.view(torch.uint8).flatten().numpy().data
    return [held[start : start + length] for start, length in zip(runs.starts, runs.lengths, strict=True)]


def test_neighbouring_blocks_make_one_run_per_layer():
    pool = pool_of(1, torch.bfloat16)
    assert len(views(pool, Span(0, 3, (2, 3, 4), 0, 4))) == 3
    assert len(views(pool, Span(0, 3, (2, 3, 5, 6), 0, 4))) == 3 * 2
    assert len(views(pool, Span(0, 3, (2, 3, 4), 0, 2))) == 3 * 3 * 2

"""Gathers a span of a KV pool into a contiguous slab, and scatters a slab into a span.

L layers, B blocks, H KV heads of the rank, S tokens of a block, D head size; a pool is [L, B, 2, H, S, D], contiguous.
A range of heads of one (layer, block, K or V) is one contiguous run, so on a device both directions move rows of a
table [L * B * 2, words of the head range]; words are as wide as divides a head, since bytes move at half the speed.
"""

import torch
from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import Copy, Span
from kv_transfer import host_copy

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
_LARGE_BLOCK_BYTES = 2**15  # above it, one call per block costs less than staging its bytes


def span_bytes(pool: Tensor, span: Span) -> int:
    """Size of a span, and of the slab that carries it, in bytes."""
    return span.num_layers * len(span.blocks) * 2 * span.num_heads * _head_bytes(pool)


def require_inside(pool: Tensor, span: Span) -> None:
    """Raises TransferFailed when a span is empty or reaches beyond the pool."""
    num_layers, num_blocks, _, num_heads, _, _ = pool.shape
    inside = (
        0 <= span.first_layer < span.first_layer + span.num_layers <= num_layers
        and 0 <= span.first_head < span.first_head + span.num_heads <= num_heads
        and bool(span.blocks)
        and min(span.blocks) >= 0
        and max(span.blocks) < num_blocks
    )
    if not inside:
        raise TransferFailed(f"span outside of a pool {tuple(pool.shape)}: {span}")


def require_same_shape(copy: Copy) -> None:
    """Raises TransferFailed when a copy's two spans differ in layers, number of blocks or number of heads."""
    source, destination = (
        (span.first_layer, span.num_layers, len(span.blocks), span.num_heads)
        for span in (copy.source, copy.destination)
    )
    if source != destination:
        raise TransferFailed(f"a copy between spans of unequal shape: {copy}")


def gather(pool: Tensor, span: Span, slab: Tensor) -> None:
    """Fills `slab`, uint8 [span_bytes], with a span of `pool`, in the order layer, block, K/V, head, token."""
    if not pool.is_cuda:
        host_copy.gather(pool, span, slab)
        return
    table, rows = _table(pool, span), _rows(pool, span)
    torch.index_select(table, 0, rows, out=slab.view(table.dtype).view(len(rows), -1))


def scatter(slab: Tensor, pool: Tensor, span: Span) -> None:
    """Writes `slab`, uint8 [span_bytes] as `gather` fills it, into a span of `pool`; blocks must be distinct."""
    if not pool.is_cuda:
        host_copy.scatter(slab, pool, span)
        return
    table, rows = _table(pool, span), _rows(pool, span)
    table.index_copy_(0, rows, slab.view(table.dtype).view(len(rows), -1))


def copy_span(source_pool: Tensor, source: Span, destination_pool: Tensor, destination: Span) -> int:
    """Copies between spans of equal shape, of one pool or two; returns the bytes.

    Between two pools each byte is read and written once, but on a device, where one call per block has to pay, only
    when blocks are large. Spans of the same pool may overlap and are gathered first.
    """
    num_bytes = span_bytes(source_pool, source)
    if source_pool is destination_pool or _is_costly_by_block(source_pool, num_bytes, len(source.blocks)):
        slab = torch.empty(num_bytes, dtype=torch.uint8, device=source_pool.device)
        gather(source_pool, source, slab)
        scatter(slab, destination_pool, destination)
        return num_bytes
    if not source_pool.is_cuda:
        host_copy.copy(source_pool, source, destination_pool, destination)
        return num_bytes
    from_blocks, to_blocks = _by_block(source_pool, source), _by_block(destination_pool, destination)
    for from_block, to_block in zip(source.blocks, destination.blocks, strict=True):
        to_blocks[:, to_block].copy_(from_blocks[:, from_block])
    return num_bytes


def _is_costly_by_block(pool: Tensor, num_bytes: int, num_blocks: int) -> bool:
    return pool.is_cuda and num_bytes < _LARGE_BLOCK_BYTES * num_blocks


def _by_block(pool: Tensor, span: Span) -> Tensor:
    """The pool's words [layers of the span, B, 2, words of the span's heads], a view."""
    num_layers, num_blocks = pool.shape[:2]
    table = _table(pool, span)
    return table.view(num_layers, num_blocks, 2, -1)[span.first_layer : span.first_layer + span.num_layers]


def _head_bytes(pool: Tensor) -> int:
    """Bytes of one KV head of one block's K (or V)."""
    return pool.shape[4] * pool.shape[5] * pool.element_size()


def _table(pool: Tensor, span: Span) -> Tensor:
    """The pool as words [L * B * 2, words of the span's heads], a view."""
    num_layers, num_blocks, _, num_heads, block_size, head_dim = pool.shape
    head_bytes = _head_bytes(pool)
    width, dtype = next((width, dtype) for width, dtype in _WORDS if head_bytes % width == 0)
    table = pool.view(num_layers * num_blocks * 2, num_heads * block_size * head_dim).view(dtype)
    words = head_bytes // width
    return table.narrow(1, span.first_head * words, span.num_heads * words)


def _rows(pool: Tensor, span: Span) -> Tensor:
    """Rows of the table, [layers * blocks * 2], that hold the span."""
    layers = torch.arange(span.first_layer, span.first_layer + span.num_layers).view(-1, 1, 1)
    blocks = torch.tensor(span.blocks).view(1, -1, 1)
    return (((layers * pool.shape[1] + blocks) * 2) + torch.arange(2)).flatten().to(pool.device)

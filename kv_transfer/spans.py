"""Gathers a span of a KV pool into a contiguous slab, and scatters a slab into a span.

L layers, B blocks, P planes (K and V, or latents alone), H KV heads of the rank, S tokens of a block, D head size: a
pool is [L, B, P, H, S, D], contiguous. A piece has s tokens, S = R * s. The slab's order is layer, piece, plane, head,
token, whatever R is, so pools of unlike block sizes exchange slabs. On a device both directions move rows of a table:

    R = 1    [L * B * P, words of the head range]           a range of heads of one block is one contiguous run
    R > 1    [L * B * P * H * R, words of s tokens]         the tokens of one head of one piece are

Words are as wide as divides the tokens of one head, since bytes move at half the speed.
"""

import torch
from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import Copy, Span
from kv_transfer import host_copy
from kv_transfer.host_copy import HostPool

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
_LARGE_BLOCK_BYTES = 2**15  # above it, one call per block costs less than staging its bytes


def span_bytes(pool: Tensor, span: Span) -> int:
    """Size of a span, and of the slab that carries it, in bytes."""
    _, _, num_planes, _, block_size, head_dim = pool.shape
    run_bytes = (span.block_tokens or block_size) * head_dim * pool.element_size()
    return span.num_layers * len(span.blocks) * num_planes * span.num_heads * run_bytes


def run_elements(pool: Tensor, span: Span) -> int:
    """Numbers in one head's tokens of one piece: contiguous in the pool and in the slab."""
    return (span.block_tokens or pool.shape[4]) * pool.shape[5]


def require_inside(pool: Tensor | HostPool, span: Span) -> None:
    """Raises TransferFailed when a span is empty, reaches beyond the pool, or cuts its blocks unevenly."""
    num_layers, num_blocks, _, num_heads, block_size, _ = pool.shape
    piece_tokens = span.block_tokens or block_size
    inside = (
        0 <= span.first_layer < span.first_layer + span.num_layers <= num_layers
        and 0 <= span.first_head < span.first_head + span.num_heads <= num_heads
        and 0 <= span.block_tokens <= block_size
        and block_size % piece_tokens == 0
        and bool(span.blocks)
        and min(span.blocks) >= 0
        and max(span.blocks) < num_blocks * (block_size // piece_tokens)
    )
    if not inside:
        raise TransferFailed(f"span outside of a pool {tuple(pool.shape)}: {span}")


def require_same_shape(copy: Copy) -> None:
    """Raises TransferFailed when a copy's two spans differ in number of layers, pieces or heads, or size of pieces."""
    source, destination = (
        (span.num_layers, len(span.blocks), span.block_tokens, span.num_heads)
        for span in (copy.source, copy.destination)
    )
    if source != destination:
        raise TransferFailed(f"a copy between spans of unequal shape: {copy}")


def gather(pool: Tensor, span: Span, slab: Tensor) -> None:
    """Fills `slab`, uint8 [span_bytes], with a span of `pool`, in the order layer, piece, plane, head, token."""
    if not pool.is_cuda:
        host_copy.gather(HostPool(pool), span, slab)
        return
    table, rows = _table(pool, span), _rows(pool, span)
    torch.index_select(table, 0, rows, out=slab.view(table.dtype).view(len(rows), -1))


def scatter(slab: Tensor, pool: Tensor, span: Span) -> None:
    """Writes `slab`, uint8 [span_bytes] as `gather` fills it, into a span of `pool`; pieces must be distinct."""
    if not pool.is_cuda:
        host_copy.scatter(slab, HostPool(pool), span)
        return
    table, rows = _table(pool, span), _rows(pool, span)
    table.index_copy_(0, rows, slab.view(table.dtype).view(len(rows), -1))


def copy_span(source_pool: Tensor, source: Span, destination_pool: Tensor, destination: Span) -> int:
    """Copies between spans of equal shape, of one pool or two; returns the bytes.

    Between two pools each byte is read and written once, but on a device, where one call per block has to pay, only
    when blocks are large. Spans of the same pool may overlap and are gathered first. Raises TransferFailed for spans of
    unequal size.
    """
    if not source_pool.is_cuda and source_pool is not destination_pool:
        return host_copy.copy(HostPool(source_pool), source, HostPool(destination_pool), destination)
    num_bytes = span_bytes(source_pool, source)
    if num_bytes != span_bytes(destination_pool, destination):
        raise TransferFailed(f"a copy between spans of unequal size: {source} to {destination}")
    if source_pool is destination_pool or _is_costly_by_piece(source_pool, num_bytes, len(source.blocks)):
        slab = torch.empty(num_bytes, dtype=torch.uint8, device=source_pool.device)
        gather(source_pool, source, slab)
        scatter(slab, destination_pool, destination)
        return num_bytes
    from_pieces, to_pieces = _by_piece(source_pool, source), _by_piece(destination_pool, destination)
    num_from, num_to = _num_pieces(source_pool, source), _num_pieces(destination_pool, destination)
    for taken, filled_piece in zip(source.blocks, destination.blocks, strict=True):
        to_block, to_part = divmod(filled_piece, num_to)
        from_block, from_part = divmod(taken, num_from)
        to_pieces[:, to_block, :, :, to_part].copy_(from_pieces[:, from_block, :, :, from_part])
    return num_bytes


def _num_pieces(pool: Tensor, span: Span) -> int:
    """R: pieces of one block."""
    block_size = pool.shape[4]
    return block_size // (span.block_tokens or block_size)


def _is_costly_by_piece(pool: Tensor, num_bytes: int, num_pieces: int) -> bool:
    return pool.is_cuda and num_bytes < _LARGE_BLOCK_BYTES * num_pieces


def _run_bytes(pool: Tensor, span: Span) -> int:
    return run_elements(pool, span) * pool.element_size()


def _word(pool: Tensor, span: Span) -> tuple[torch.dtype, int]:
    """The widest word of which a run is a whole number, and that number."""
    run_bytes = _run_bytes(pool, span)
    return next((dtype, run_bytes // width) for width, dtype in _WORDS if run_bytes % width == 0)


def _by_piece(pool: Tensor, span: Span) -> Tensor:
    """The pool's words [layers of the span, B, P, heads of the span, R, words of a run], a view."""
    dtype, _ = _word(pool, span)
    pieces = pool.view(*pool.shape[:4], -1, run_elements(pool, span)).view(dtype)
    pieces = pieces.narrow(0, span.first_layer, span.num_layers)
    return pieces.narrow(3, span.first_head, span.num_heads)


def _table(pool: Tensor, span: Span) -> Tensor:
    """The pool's words in rows, a view; see the module."""
    num_layers, num_blocks, num_planes, num_heads, block_size, head_dim = pool.shape
    dtype, words = _word(pool, span)
    if _num_pieces(pool, span) > 1:
        return pool.view(-1, run_elements(pool, span)).view(dtype)
    table = pool.view(num_layers * num_blocks * num_planes, num_heads * block_size * head_dim).view(dtype)
    return table.narrow(1, span.first_head * words, span.num_heads * words)


def _rows(pool: Tensor, span: Span) -> Tensor:
    """Rows of the table that hold the span, in the slab's order."""
    _, num_blocks, num_planes, num_heads, _, _ = pool.shape
    num_pieces = _num_pieces(pool, span)
    layers = torch.arange(span.first_layer, span.first_layer + span.num_layers).view(-1, 1, 1)
    pieces = torch.tensor(span.blocks).view(1, -1, 1)
    rows = (layers * num_blocks + pieces // num_pieces) * num_planes + torch.arange(num_planes)
    if num_pieces > 1:
        heads = torch.arange(span.first_head, span.first_head + span.num_heads)
        rows = (rows[..., None] * num_heads + heads) * num_pieces + (pieces % num_pieces)[..., None]
    return rows.flatten().to(pool.device)

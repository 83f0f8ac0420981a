"""Spans of KV pools in host memory: copied at the speed of memcpy, or listed as the runs of bytes that they consist of.

One strided assignment moves all layers of a run of neighbouring blocks. NumPy's moves contiguous parts by memmove and
lets other threads run meanwhile; torch's index_copy_ takes twice, one call per contiguous part a quarter longer.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.messages.to_rank import Span

Bytes = NDArray[np.uint8]


def gather(pool: Tensor, span: Span, slab: Tensor) -> None:
    """See spans.gather."""
    held = _held(pool, span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, block in _neighbours(span.blocks):
        packed[:, first:last] = held[:, block : block + last - first]


def scatter(slab: Tensor, pool: Tensor, span: Span) -> None:
    """See spans.scatter."""
    held = _held(pool, span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, block in _neighbours(span.blocks):
        held[:, block : block + last - first] = packed[:, first:last]


def copy(source_pool: Tensor, source: Span, destination_pool: Tensor, destination: Span) -> None:
    """Copies between spans of equal shape of two pools."""
    taken, filled = _held(source_pool, source), _held(destination_pool, destination)
    for first, last, from_block, to_block in _neighbours(source.blocks, destination.blocks):
        filled[:, to_block : to_block + last - first] = taken[:, from_block : from_block + last - first]


def runs(pool: Bytes, span: Span) -> list[memoryview]:
    """A span's bytes in the order of a slab, neighbouring whole blocks as one run: writable views of the pool."""
    layer_bytes, block_bytes, side_bytes, head_bytes = pool.strides[:4]
    run_bytes, offset = span.num_heads * head_bytes, span.first_head * head_bytes
    if run_bytes == side_bytes:
        parts = [(block * block_bytes, (last - first) * block_bytes) for first, last, block in _neighbours(span.blocks)]
    else:
        sides = (offset, offset + side_bytes)
        parts = [(block * block_bytes + side, run_bytes) for block in span.blocks for side in sides]
    flat = pool.reshape(-1).data
    layers = [layer * layer_bytes for layer in range(span.first_layer, span.first_layer + span.num_layers)]
    return [flat[layer + start : layer + start + size] for layer in layers for start, size in parts]


def bytes_of(pool: Tensor) -> Bytes:
    """The pool's bytes [L, B, 2, H, S, bytes of a head's token], a view."""
    viewed: Bytes = pool.view(torch.uint8).numpy()
    return viewed


def _held(pool: Tensor, span: Span) -> Bytes:
    """The pool's bytes [layers of the span, B, 2, heads of the span, S, bytes of a head's token], a view."""
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    return bytes_of(pool)[layers, :, :, span.first_head : span.first_head + span.num_heads]


def _packed(slab: Tensor, held: Bytes, num_blocks: int) -> Bytes:
    """The slab [layers, blocks of the span, 2, heads, S, bytes of a head's token], a view."""
    return slab.numpy().reshape(held.shape[0], num_blocks, *held.shape[2:])


def _neighbours(*sides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """(first, last, block of each side) of the longest runs `first:last` in which all sides' blocks count up by one."""
    num_blocks = len(sides[0])
    if all(side == tuple(range(side[0], side[0] + num_blocks)) for side in sides):
        return iter([(0, num_blocks, *(side[0] for side in sides))])
    blocks = np.array(sides)
    firsts = np.flatnonzero((np.diff(blocks, prepend=-2) != 1).any(axis=0))
    lasts = np.append(firsts[1:], num_blocks)
    return zip(firsts.tolist(), lasts.tolist(), *blocks[:, firsts].tolist(), strict=True)

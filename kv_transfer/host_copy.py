"""Spans of KV pools in host memory, copied at the speed of memcpy.

One strided assignment moves all layers of a run of neighbouring blocks, or of one piece of a block. NumPy's moves
contiguous parts by memmove and lets other threads run meanwhile; torch's index_copy_ takes twice, one call per
contiguous part a quarter longer.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.messages.to_rank import Span

Bytes = NDArray[np.uint8]
Place = tuple[slice, ...]


def gather(pool: Tensor, span: Span, slab: Tensor) -> None:
    """See spans.gather."""
    held = _held(pool, span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, place in _places(held, span):
        packed[:, first:last] = held[place]


def scatter(slab: Tensor, pool: Tensor, span: Span) -> None:
    """See spans.scatter."""
    held = _held(pool, span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, place in _places(held, span):
        held[place] = packed[:, first:last]


def copy(source_pool: Tensor, source: Span, destination_pool: Tensor, destination: Span) -> None:
    """Copies between spans of equal shape of two pools."""
    taken, filled = _held(source_pool, source), _held(destination_pool, destination)
    if _num_parts(taken) == _num_parts(filled) == 1:
        for first, last, from_block, to_block in _neighbours(source.blocks, destination.blocks):
            filled[:, to_block : to_block + last - first] = taken[:, from_block : from_block + last - first]
        return
    for from_piece, to_piece in zip(source.blocks, destination.blocks, strict=True):
        filled[_place(filled, to_piece)] = taken[_place(taken, from_piece)]


def _held(pool: Tensor, span: Span) -> Bytes:
    """The pool's bytes [layers of the span, B, P, heads of the span, R, bytes of a run], a view."""
    num_bytes = pool.shape[4] * pool.shape[5] * pool.element_size()
    num_parts = pool.shape[4] // (span.block_tokens or pool.shape[4])
    viewed: Bytes = pool.view(torch.uint8).view(*pool.shape[:4], num_parts, num_bytes // num_parts).numpy()
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    return viewed[layers, :, :, span.first_head : span.first_head + span.num_heads]


def _packed(slab: Tensor, held: Bytes, num_pieces: int) -> Bytes:
    """The slab [layers, pieces of the span, P, heads, 1, bytes of a run], a view."""
    return slab.numpy().reshape(held.shape[0], num_pieces, *held.shape[2:4], 1, held.shape[5])


def _places(held: Bytes, span: Span) -> Iterator[tuple[int, int, Place]]:
    """(first, last, where the span's pieces `first:last` lie) of the longest parts that one assignment moves."""
    if _num_parts(held) == 1:
        for first, last, block in _neighbours(span.blocks):
            yield first, last, (slice(None), slice(block, block + last - first))
    else:
        for number, piece in enumerate(span.blocks):
            yield number, number + 1, _place(held, piece)


def _place(held: Bytes, piece: int) -> Place:
    """Where one piece lies, without losing a dimension."""
    block, part = divmod(piece, _num_parts(held))
    return slice(None), slice(block, block + 1), slice(None), slice(None), slice(part, part + 1)


def _num_parts(held: Bytes) -> int:
    """R: pieces of one block."""
    return int(held.shape[4])


def _neighbours(*sides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """(first, last, block of each side) of the longest runs `first:last` in which all sides' blocks count up by one."""
    num_blocks = len(sides[0])
    if all(side == tuple(range(side[0], side[0] + num_blocks)) for side in sides):
        return iter([(0, num_blocks, *(side[0] for side in sides))])
    blocks = np.array(sides)
    firsts = np.flatnonzero((np.diff(blocks, prepend=-2) != 1).any(axis=0))
    lasts = np.append(firsts[1:], num_blocks)
    return zip(firsts.tolist(), lasts.tolist(), *blocks[:, firsts].tolist(), strict=True)

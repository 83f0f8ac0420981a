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


def runs(pool: Tensor, span: Span) -> list[memoryview]:
    """The span's bytes in the order of a slab, neighbours as one run; writable views of the pool."""
    held = _held(pool, span)
    run_bytes, axis = 1, held.ndim
    while axis > 2 and held.strides[axis - 1] == run_bytes:
        axis -= 1
        run_bytes *= held.shape[axis]
    places = [np.arange(held.shape[0]), np.array(span.blocks), *map(np.arange, held.shape[2:axis])]
    starts: NDArray[np.int64] = np.array(held.ctypes.data - pool.data_ptr())
    for place, stride in zip(places, held.strides, strict=False):
        starts = np.add.outer(starts, place * stride)
    starts = starts.ravel()
    firsts = np.flatnonzero(np.diff(starts, prepend=-1 - run_bytes) != run_bytes)
    lengths = np.diff(firsts, append=len(starts)) * run_bytes
    flat = pool.view(-1).view(torch.uint8).numpy().data
    return [flat[start : start + size] for start, size in zip(starts[firsts].tolist(), lengths.tolist(), strict=True)]


def _held(pool: Tensor, span: Span) -> Bytes:
    """The pool's bytes [layers of the span, B, 2, heads of the span, S, bytes of a head's token], a view."""
    held: Bytes = pool.view(torch.uint8).numpy()
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    return held[layers, :, :, span.first_head : span.first_head + span.num_heads]


def _packed(slab: Tensor, held: Bytes, num_blocks: int) -> Bytes:
    """The slab [layers, blocks of the span, 2, heads, S, bytes of a head's token], a view."""
    return slab.numpy().reshape(held.shape[0], num_blocks, *held.shape[2:])


def _neighbours(*sides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """(first, last, block of each side) of the longest runs `first:last` in which all sides' blocks count up by one."""
    first, num_blocks = 0, len(sides[0])
    while first < num_blocks:
        last = first + 1
        while last < num_blocks and all(side[last] == side[last - 1] + 1 for side in sides):
            last += 1
        yield (first, last, *(side[first] for side in sides))
        first = last

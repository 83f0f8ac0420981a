"""Spans of KV pools in host memory, copied at the speed of memcpy or faster.

Large slabs pass by the caches (stream_copy.py). Of others, and where that cannot be, one strided assignment moves all
layers of a run of neighbouring blocks, or of one piece of a block. NumPy's moves contiguous parts by memmove and lets
other threads run meanwhile; torch's index_copy_ takes twice, one call per contiguous part a quarter longer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import Span
from kv_transfer.runs import Starts, least_run_bytes, runs_of, starts_of
from kv_transfer.stream_copy import LEAST_BYTES, load_stream_copy

Bytes = NDArray[np.uint8]
Place = tuple[slice, ...]


@dataclass(frozen=True)
class _Side:
    """One end of a copy: parts of `run_bytes` lie together, as do all that divide them; `starts` says where."""

    address: int
    run_bytes: int
    starts: Callable[[int], Starts]  # (bytes of a part) -> bytes from the address, in the order of a slab


class HostPool:
    """A pool in host memory as NumPy sees it; views are made once, since making them takes as long as small copies."""

    def __init__(self, pool: Tensor) -> None:
        self.shape = tuple(pool.shape)
        self._token_bytes = self.shape[5] * pool.element_size()  # of one head and plane
        self._pool = pool
        self._bytes: Bytes = pool.view(torch.uint8).view(*self.shape[:4], -1).numpy()
        self._flat = self._bytes.reshape(-1).data
        load_stream_copy()  # which may take a second to compile: now, rather than when the first slab comes
        self._by_parts: dict[int, Bytes] = {}

    def span_bytes(self, span: Span) -> int:
        """See spans.span_bytes."""
        num_tokens = span.block_tokens or self.shape[4]
        return span.num_layers * len(span.blocks) * self.shape[2] * span.num_heads * num_tokens * self._token_bytes

    def side(self, span: Span) -> _Side:
        """A span as an end of a copy."""
        starts = partial(starts_of, self._pool, span)
        return _Side(self._pool.data_ptr(), least_run_bytes(self._pool, span), starts)

    def part(self, span: Span) -> Bytes:
        """[layers of the span, B, P, heads of the span, R, bytes of a run], a view."""
        num_parts = self.shape[4] // span.block_tokens if span.block_tokens else 1
        held = self._by_parts.get(num_parts)
        if held is None:
            held = self._by_parts[num_parts] = self._bytes.reshape(*self.shape[:4], num_parts, -1)
        layers = slice(span.first_layer, span.first_layer + span.num_layers)
        return held[layers, :, :, span.first_head : span.first_head + span.num_heads]

    def runs(self, span: Span) -> list[memoryview]:
        """The contiguous parts of a span in the order of a slab; those of neighbouring blocks of a layer are one."""
        _, num_blocks, num_planes, num_heads, block_size, _ = self.shape
        flat = self._flat
        if span.num_heads < num_heads or span.block_tokens not in (0, block_size):
            parts = runs_of(self._pool, span)
            ends = parts.starts + parts.lengths
            return [flat[start:end] for start, end in zip(parts.starts.tolist(), ends.tolist(), strict=True)]
        block_bytes = num_planes * num_heads * block_size * self._token_bytes  # of a layer
        of_layer = [
            (block * block_bytes, (block + last - first) * block_bytes)
            for first, last, block in _neighbours(span.blocks)
        ]
        layer_bytes = num_blocks * block_bytes
        layers = range(span.first_layer * layer_bytes, (span.first_layer + span.num_layers) * layer_bytes, layer_bytes)
        return [flat[layer + start : layer + end] for layer in layers for start, end in of_layer]


def gather(pool: HostPool, span: Span, slab: Tensor) -> None:
    """See spans.gather."""
    if _streamed(_side_of(slab), pool.side(span), slab.numel()):
        return
    held = pool.part(span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, place in _places(held, span):
        packed[:, first:last] = held[place]


def scatter(slab: Tensor, pool: HostPool, span: Span) -> None:
    """See spans.scatter."""
    if _streamed(pool.side(span), _side_of(slab), slab.numel()):
        return
    held = pool.part(span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, place in _places(held, span):
        held[place] = packed[:, first:last]


def copy(source_pool: HostPool, source: Span, destination_pool: HostPool, destination: Span) -> int:
    """Copies between spans of equal shape of two pools; returns the bytes. Raises TransferFailed for others."""
    num_bytes = source_pool.span_bytes(source)
    if num_bytes != destination_pool.span_bytes(destination):
        raise TransferFailed(f"a copy between spans of unequal size: {source} to {destination}")
    if _streamed(destination_pool.side(destination), source_pool.side(source), num_bytes):
        return num_bytes
    taken, filled = source_pool.part(source), destination_pool.part(destination)
    if _num_parts(taken) == _num_parts(filled) == 1:
        for first, last, from_block, to_block in _neighbours(source.blocks, destination.blocks):
            filled[:, to_block : to_block + last - first] = taken[:, from_block : from_block + last - first]
        return num_bytes
    for from_piece, to_piece in zip(source.blocks, destination.blocks, strict=True):
        filled[_place(filled, to_piece)] = taken[_place(taken, from_piece)]
    return num_bytes


def _streamed(to: _Side, source: _Side, num_bytes: int) -> bool:
    """Copies past the caches; False, and nothing is done, where that does not pay or cannot be.

    Raises TransferFailed unless both sides have so many bytes in equal parts: compiled code looks at no bounds.
    """
    stream_runs = load_stream_copy() if num_bytes >= LEAST_BYTES else None
    if stream_runs is None:
        return False
    run_bytes = min(to.run_bytes, source.run_bytes)
    to_starts, from_starts = to.starts(run_bytes), source.starts(run_bytes)
    if not len(to_starts) * run_bytes == len(from_starts) * run_bytes == num_bytes:
        raise TransferFailed(f"a copy of {num_bytes} bytes between spans of unequal shape, or beside its slab")
    stream_runs(to.address, to_starts, source.address, from_starts, run_bytes)
    return True


def _side_of(slab: Tensor) -> _Side:
    return _Side(slab.data_ptr(), slab.numel(), partial(np.arange, 0, slab.numel()))


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

"""Spans of KV pools in host memory, copied at the speed of memcpy or faster.

Large slabs pass by the caches (stream_copy.py). Of others, and where that cannot be, one strided assignment moves all
layers of a run of neighbouring blocks, or of one piece of a block. NumPy's moves contiguous parts by memmove and lets
other threads run meanwhile; torch's index_copy_ takes twice, one call per contiguous part a quarter longer.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import Span
from kv_transfer.runs import Starts, least_run_bytes, runs_of, starts_of
from kv_transfer.stream_copy import LEAST_BYTES, StreamRuns, load_stream_copy

Bytes = NDArray[np.uint8]
Place = tuple[slice, ...]


class HostPool:
    """A pool in host memory as NumPy sees it; views are made once, since making them takes as long as small copies."""

    def __init__(self, pool: Tensor) -> None:
        self.shape = tuple(pool.shape)
        self._token_bytes = self.shape[5] * pool.element_size()  # of one head and plane
        self._pool = pool
        self._bytes: Bytes = pool.view(torch.uint8).view(*self.shape[:4], -1).numpy()
        self._flat = self._bytes.reshape(-1).data
        self.address = pool.data_ptr()
        self._stream = load_stream_copy()
        self._by_parts: dict[int, Bytes] = {}

    def span_bytes(self, span: Span) -> int:
        """See spans.span_bytes."""
        num_tokens = span.block_tokens or self.shape[4]
        return span.num_layers * len(span.blocks) * self.shape[2] * span.num_heads * num_tokens * self._token_bytes

    def stream_of(self, num_bytes: int) -> StreamRuns | None:
        """What copies as many bytes of this pool faster than NumPy does."""
        return self._stream if num_bytes >= LEAST_BYTES else None

    def least_run_bytes(self, span: Span) -> int:
        """See runs.least_run_bytes."""
        return least_run_bytes(self._pool, span)

    def starts(self, span: Span, run_bytes: int) -> Starts:
        """See runs.starts_of."""
        return starts_of(self._pool, span, run_bytes)

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
    if (stream := pool.stream_of(slab.numel())) is not None:
        _require_whole(slab, pool, span)
        run_bytes = pool.least_run_bytes(span)
        stream(slab.data_ptr(), _packed_starts(slab, run_bytes), pool.address, pool.starts(span, run_bytes), run_bytes)
        return
    held = pool.part(span)
    packed = _packed(slab, held, len(span.blocks))
    for first, last, place in _places(held, span):
        packed[:, first:last] = held[place]


def scatter(slab: Tensor, pool: HostPool, span: Span) -> None:
    """See spans.scatter."""
    if (stream := pool.stream_of(slab.numel())) is not None:
        _require_whole(slab, pool, span)
        run_bytes = pool.least_run_bytes(span)
        stream(pool.address, pool.starts(span, run_bytes), slab.data_ptr(), _packed_starts(slab, run_bytes), run_bytes)
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
    if (stream := destination_pool.stream_of(num_bytes)) is not None:
        run_bytes = min(source_pool.least_run_bytes(source), destination_pool.least_run_bytes(destination))
        to_starts, from_starts = destination_pool.starts(destination, run_bytes), source_pool.starts(source, run_bytes)
        if not len(to_starts) * run_bytes == len(from_starts) * run_bytes == num_bytes:
            raise TransferFailed(f"a copy between spans of unequal shape: {source} to {destination}")
        stream(destination_pool.address, to_starts, source_pool.address, from_starts, run_bytes)
        return num_bytes
    taken, filled = source_pool.part(source), destination_pool.part(destination)
    if _num_parts(taken) == _num_parts(filled) == 1:
        for first, last, from_block, to_block in _neighbours(source.blocks, destination.blocks):
            filled[:, to_block : to_block + last - first] = taken[:, from_block : from_block + last - first]
        return num_bytes
    for from_piece, to_piece in zip(source.blocks, destination.blocks, strict=True):
        filled[_place(filled, to_piece)] = taken[_place(taken, from_piece)]
    return num_bytes


def _require_whole(slab: Tensor, pool: HostPool, span: Span) -> None:
    """Compiled code looks at no bounds. Raises TransferFailed."""
    if slab.numel() != pool.span_bytes(span):
        raise TransferFailed(f"a slab of {slab.numel()} bytes for {span}, which has {pool.span_bytes(span)}")


def _packed(slab: Tensor, held: Bytes, num_pieces: int) -> Bytes:
    """The slab [layers, pieces of the span, P, heads, 1, bytes of a run], a view."""
    return slab.numpy().reshape(held.shape[0], num_pieces, *held.shape[2:4], 1, held.shape[5])


def _packed_starts(slab: Tensor, run_bytes: int) -> Starts:
    return np.arange(0, slab.numel(), run_bytes)


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

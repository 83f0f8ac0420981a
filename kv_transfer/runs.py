"""The contiguous runs of bytes that a span is made of, for whoever moves memory by address."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.messages.to_rank import Span

Starts = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """Contiguous parts of a pool, in bytes from its start."""

    starts: Starts
    lengths: Starts


def runs_of(pool: Tensor, span: Span) -> Runs:
    """A span of a pool [L, B, P, H, S, D] in the order of a slab (layer, piece, plane, head, token), neighbours joined.

    Only the pool's shape and dtype are looked at.
    """
    run_bytes = least_run_bytes(pool, span)
    starts = starts_of(pool, span, run_bytes)
    first = np.concatenate(([0], np.flatnonzero(np.diff(starts) != run_bytes) + 1))
    return Runs(starts[first], np.diff(first, append=len(starts)) * run_bytes)


def least_run_bytes(pool: Tensor, span: Span) -> int:
    """What lies together whichever blocks a span names: a block, a range of heads, or one head's tokens of a piece."""
    _, _, num_planes, num_heads, block_size, head_dim = pool.shape
    token_bytes = head_dim * pool.element_size()
    if span.block_tokens not in (0, block_size):
        return span.block_tokens * token_bytes
    return (num_planes * num_heads if span.num_heads == num_heads else span.num_heads) * block_size * token_bytes


def starts_of(pool: Tensor, span: Span, run_bytes: int) -> Starts:
    """Where parts of `run_bytes`, which divides `least_run_bytes`, begin, in the order of a slab, in bytes."""
    _, num_blocks, num_planes, num_heads, block_size, head_dim = pool.shape
    head_bytes = block_size * head_dim * pool.element_size()
    block_bytes = num_planes * num_heads * head_bytes
    layer_bytes = num_blocks * block_bytes
    end = span.first_layer + span.num_layers
    layers = np.arange(span.first_layer * layer_bytes, end * layer_bytes, layer_bytes)
    blocks = np.array(span.blocks, dtype=np.int64)
    num_parts = block_size // (span.block_tokens or block_size)
    if num_parts == 1 and span.num_heads == num_heads:
        starts = layers[:, None] + blocks * block_bytes
    else:
        blocks, parts = np.divmod(blocks, num_parts)
        pieces = blocks * block_bytes + parts * (head_bytes // num_parts)
        heads = np.arange(span.first_head, span.first_head + span.num_heads) * head_bytes
        planes = np.arange(num_planes)[:, None] * (num_heads * head_bytes)
        starts = (
            layers[:, None, None, None] + pieces[:, None, None] + (planes + (heads if num_parts > 1 else heads[:1]))
        )
    starts = starts.reshape(-1)
    whole_bytes = least_run_bytes(pool, span)
    return starts if run_bytes == whole_bytes else (starts[:, None] + np.arange(0, whole_bytes, run_bytes)).ravel()

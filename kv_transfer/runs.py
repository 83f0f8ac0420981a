"""The contiguous runs of bytes that a span is made of, for transports that move memory by address."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from core.messages.to_rank import Span


@dataclass(frozen=True)
class Runs:
    """Contiguous parts of a pool, in bytes from its start."""

    starts: "np.ndarray[Any, Any]"
    lengths: "np.ndarray[Any, Any]"


def runs_of(pool: Tensor, span: Span) -> Runs:
    """A span of a pool [L, B, P, H, S, D] in the order of a slab (layer, piece, plane, head, token), neighbours joined.

    Only the pool's shape and dtype are looked at.
    """
    _, num_blocks, num_planes, num_heads, block_size, head_dim = pool.shape
    head_bytes = block_size * head_dim * pool.element_size()
    num_parts = block_size // (span.block_tokens or block_size)
    blocks, parts = np.divmod(np.array(span.blocks), num_parts)
    layers = np.arange(span.first_layer, span.first_layer + span.num_layers)[:, None, None, None]
    heads = np.arange(span.first_head, span.first_head + span.num_heads)
    planes = (layers * num_blocks + blocks[:, None, None]) * num_planes + np.arange(num_planes)[:, None]
    run_bytes = head_bytes // num_parts
    starts = ((planes * num_heads + heads) * head_bytes + (parts * run_bytes)[:, None, None]).ravel()
    first = np.concatenate(([0], np.flatnonzero(np.diff(starts) != run_bytes) + 1))
    return Runs(starts[first], np.diff(first, append=len(starts)) * run_bytes)

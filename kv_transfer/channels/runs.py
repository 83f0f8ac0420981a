"""The contiguous pieces of a KV pool that a span is made of, for transports that move memory by address."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from core.messages.to_rank import Span


@dataclass(frozen=True)
class Runs:
    """Contiguous pieces of a pool, in bytes from its start."""

    starts: "np.ndarray[Any, Any]"
    lengths: "np.ndarray[Any, Any]"


def runs_of(pool: Tensor, span: Span) -> Runs:
    """A span of a pool [L, B, 2, H, S, D] in `gather`'s order, neighbours joined."""
    num_blocks, num_heads = pool.shape[1], pool.shape[3]
    head_bytes = pool.shape[4] * pool.shape[5] * pool.element_size()
    layers = np.arange(span.first_layer, span.first_layer + span.num_layers)[:, None, None]
    rows = (layers * num_blocks + np.array(span.blocks)[None, :, None]) * 2 + np.arange(2)
    starts = (rows.ravel() * num_heads + span.first_head) * head_bytes
    run_bytes = span.num_heads * head_bytes
    first = np.concatenate(([0], np.flatnonzero(np.diff(starts) != run_bytes) + 1))
    return Runs(starts[first], np.diff(first, append=len(starts)) * run_bytes)

"""What one step of a replica computes, and who says how long that takes. Pure."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepWork:
    """One forward pass over a mixed batch."""

    chunks: tuple[tuple[int, int], ...] = ()  # of prompts: (tokens computed, tokens of context before them)
    num_decoding: int = 0  # sequences that advance by one token
    num_kv_tokens: int = 0  # context of all of those together


class CostModel(Protocol):
    """Times of one replica's steps, all ranks together."""

    def step_s(self, work: StepWork) -> float:
        """Seconds from launch to sampled tokens."""
        ...

    def decode_steps_s(self, num_decoding: int, num_kv_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds of steps without chunks, by context [num_steps]: to the bit what `step_s` says of each."""
        ...


@dataclass(frozen=True)
class Link:
    """The way of KV from one replica to another; transfers that share an end share its speed."""

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        assert self.bytes_per_s > 0
        assert self.latency_s >= 0

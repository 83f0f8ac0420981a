"""Rotary position embedding (Su et al., 2021), with Llama 3's frequency scaling.

Shapes: T tokens, H heads, D head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Rope:
    """How positions become angles; `scaling` is None, a linear factor, or Llama 3's rule."""

    theta: float
    scaling: Llama3Scaling | float | None = None


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair, [D / 2] in float32."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.scaling is None:
        return frequencies
    if isinstance(rope.scaling, float):
        return frequencies / rope.scaling
    scaling = rope.scaling
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)  # 0: stretched, 1: kept
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotary_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, D] of int64 positions [T]; the sines of the first half are negated for `rotate`."""
    angles = positions.float()[:, None] * frequencies  # [T, D / 2]
    cosines, sines = angles.cos(), angles.sin()
    return (
        torch.cat((cosines, cosines), dim=-1).to(dtype)[:, None],
        torch.cat((-sines, sines), dim=-1).to(dtype)[:, None],
    )


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates heads [T, H, D]: pair i is made of the elements i and i + D / 2."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cosines).addcmul_(swapped, sines)

"""Rotary position embedding (Su et al., 2021) with the scaling rules of rope_spec.

Shapes: T tokens, H heads, D head size, R <= D rotated elements.
"""

import math

import torch
from torch import Tensor

from engine.rope_spec import Llama3Scaling, LongScaling, Rope, YarnScaling


def inverse_frequencies(rope: Rope) -> Tensor:
    """Radians per position of each rotated pair, [R / 2] in float32."""
    exponents = torch.arange(0, rope.rotated, 2, dtype=torch.int64).float() / rope.rotated
    frequencies = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return frequencies
        case float(factor):
            return frequencies / factor
        case LongScaling(factors):
            return 1.0 / (torch.tensor(factors) * rope.theta**exponents)
        case Llama3Scaling():
            return _llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _yarn(frequencies, rope.scaling, rope)
    raise AssertionError(rope.scaling)


def pair_angles(positions: Tensor, frequencies: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each rotated pair, [T, R / 2] in float32, at int64 positions [T]."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos() * rope.magnitude, angles.sin() * rope.magnitude


def rotary_angles(cosines: Tensor, sines: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Those of pairs, for each element, [T, 1, R]; sines of the first elements of pairs are negated."""
    dim = -1 if rope.interleaved else -2  # elements of a pair: next to each other, or halves apart
    return (
        torch.stack((cosines, cosines), dim).flatten(-2).to(dtype)[:, None],
        torch.stack((-sines, sines), dim).flatten(-2).to(dtype)[:, None],
    )


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates the first R elements of heads [T, H, D]: pair i is made of the elements i and i + R / 2, or, interleaved,
    2i and 2i + 1.
    """
    size = cosines.shape[-1]
    if size < heads.shape[-1]:
        rotated = rotate(heads[..., :size], cosines, sines, interleaved=interleaved)
        return torch.cat((rotated, heads[..., size:]), dim=-1)
    swapped = _neighbours_swapped(heads) if interleaved else heads.roll(size // 2, dims=-1)
    return (heads * cosines).addcmul_(swapped, sines)


def _neighbours_swapped(heads: Tensor) -> Tensor:
    return heads.view(*heads.shape[:-1], -1, 2).flip(-1).flatten(-2)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)  # 0: stretched, 1: kept
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: Tensor, scaling: YarnScaling, rope: Rope) -> Tensor:
    def pair_that_turns(times: float) -> float:
        """Index of the pair that turns so often within the original length, a real number."""
        wavelength = scaling.original_max_positions / (times * 2 * math.pi)
        return rope.rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rope.rotated - 1.0)
    pairs = torch.arange(len(frequencies), dtype=torch.float32)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies

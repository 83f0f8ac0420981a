"""What a decoder computes beside products and attention: norms, rotations, activations. In torch, for all devices.

Shapes: T rows, H heads, D head size, R <= D rotated elements, I inner size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from engine.model_spec import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation
from engine.rope import pair_angles, rotary_angles, rotate
from engine.rope_spec import Rope


@dataclass(frozen=True)
class Norm:
    """A root mean square norm (Zhang and Sennrich, 2019). `weight` is `stored` plus the offset that the model counts
    from: then in float32, since few bits do not hold both.
    """

    stored: Tensor
    weight: Tensor
    has_offset: bool  # of one
    eps: float


Angles = tuple[Tensor, Tensor]  # of a step's positions, as the kernels that made them take them


class Kernels(Protocol):
    """Results may lie where arguments lay."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Over the last dimension of [T, hidden] or [T, H, D]."""
        ...

    def add_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The sum [T, hidden], and its norm."""
        ...

    def angles(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> Angles:
        """For `rotate`; positions int64 [T], radians per position [R / 2]."""
        ...

    def rotate(self, heads: Tensor, angles: Angles, *, interleaved: bool) -> Tensor:
        """[T, H, D] with the first R elements turned; see rope.rotate."""
        ...

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """[T, 2 I] -> [T, I]: act(gate) * up."""
        ...


class TorchKernels:
    """One operation after the other."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See Kernels."""
        weight = norm.weight
        return rms_norm(x.to(weight.dtype), weight.shape, weight, norm.eps).to(x.dtype)

    def add_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """See Kernels."""
        total = residual + x
        return total, self.norm(total, norm)

    def angles(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> Angles:
        """Cosines and sines."""
        return rotary_angles(*pair_angles(positions, frequencies, rope), rope, dtype)

    def rotate(self, heads: Tensor, angles: Angles, *, interleaved: bool) -> Tensor:
        """See Kernels."""
        return rotate(heads, *angles, interleaved=interleaved)

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See Kernels."""
        gate, up = gate_up.chunk(2, dim=-1)
        match activation:
            case "silu":
                return silu(gate) * up
            case "gelu_tanh":
                return gelu(gate, approximate="tanh") * up
            case "clamped_swiglu":
                gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
                return (up + 1) * (gate * torch.sigmoid(SWIGLU_ALPHA * gate))

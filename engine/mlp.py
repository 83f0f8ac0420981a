"""Gated feed-forward networks. Shapes: T rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from engine.linear import Linear
from engine.model_spec import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return gelu(gate, approximate="tanh") * up


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * (gate * torch.sigmoid(SWIGLU_ALPHA * gate))


Activate = Callable[[Tensor, Tensor], Tensor]  # (gate, up)
ACTIVATIONS: dict[Activation, Activate] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "clamped_swiglu": _clamped_swiglu,
}


@dataclass(frozen=True)
class Mlp:
    """This rank's part of the inner size: the ranks' results are to be summed."""

    gate_up: Linear
    down: Linear
    activate: Activate

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down(self.activate(*self.gate_up(x).chunk(2, dim=-1)))

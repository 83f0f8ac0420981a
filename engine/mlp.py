"""Gated feed-forward networks. Shapes: T rows."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.linear import Linear

Activate = Callable[[Tensor], Tensor]  # of gate and up side by side


@dataclass(frozen=True)
class Mlp:
    """This rank's part of the inner size: the ranks' results are to be summed."""

    gate_up: Linear
    down: Linear
    activate: Activate

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down(self.activate(self.gate_up(x)))

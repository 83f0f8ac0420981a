"""Gated feed-forward networks. Shapes: T rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.linear import Linear

Activate = Callable[[Tensor], Tensor]  # of gate and up side by side

_ROWS_IN_CACHES = 512  # of a CPU: what lies between the products is several times as wide as what goes in and comes out


@dataclass(frozen=True)
class Mlp:
    """This rank's part of the inner size: the ranks' results are to be summed."""

    gate_up: Linear
    down: Linear
    activate: Activate

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        if x.device.type == "cpu" and len(x) > _ROWS_IN_CACHES:
            return torch.cat([self._feed(rows) for rows in torch.split(x, _ROWS_IN_CACHES)])
        return self._feed(x)

    def _feed(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x)))

"""Experts of one rank on a CPU: rows are sorted by expert, every expert that is wanted takes its run of rows at once.

Shapes: T rows, k experts per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.grouped_experts import GroupedExperts
from engine.mlp import Mlp
from engine.router import Router


class Experts:
    """Gated feed-forward networks of one size."""

    def __init__(self, first: int, experts: Sequence[Mlp]) -> None:
        """The model's experts numbered from `first` on, or this rank's part of each."""
        self._first = first
        self._experts = experts

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Rows [T, hidden], experts of the model [T, k] and their weights: [T, hidden]; other ranks' add nothing."""
        num_experts = len(self._experts)
        local = (chosen.flatten() - self._first).clamp(-1, num_experts)  # -1 and num_experts: elsewhere
        before, *counts = torch.bincount(local + 1, minlength=num_experts + 2).tolist()[:-1]
        order = local.argsort(stable=True)[before : before + sum(counts)]
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if len(order):
            rows = order // chosen.shape[1]
            parts = zip(self._experts, torch.split(x[rows], counts), strict=True)
            outputs = torch.cat([expert(part) for expert, part in parts if len(part)])
            mixed.index_add_(0, rows, outputs.float() * weights.flatten()[order, None])
        return mixed.to(x.dtype)


@dataclass(frozen=True)
class MixtureOfExperts:
    """This rank's part of every expert, or its share of whole experts: the ranks' results are to be summed."""

    router: Router
    experts: Experts | GroupedExperts
    shared: Mlp | None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        mixed = self.experts(x, *self.router(x))
        return mixed if self.shared is None else mixed + self.shared(x)

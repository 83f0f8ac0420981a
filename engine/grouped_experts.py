"""Experts of one rank on a GPU: one grouped matrix product for all of them, and nothing that waits for the device.

Shapes: T rows, k experts per row, E experts of this rank, hidden size D, inner size I of this rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from engine.mlp import Activate


@dataclass(frozen=True)
class GroupedExperts:
    """The model's experts numbered from `first` on, or this rank's part of each, stacked."""

    first: int
    gate_up: Tensor  # [E, 2 I, D]
    gate_up_bias: Tensor | None  # [E, 2 I]
    down: Tensor  # [E, D, I]
    down_bias: Tensor | None  # [E, D]
    activate: Activate

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See experts.Experts."""
        num_experts = len(self.down)
        local = chosen.flatten() - self.first
        local = local.masked_fill((local < 0) | (local >= num_experts), num_experts)  # elsewhere: behind all groups
        of_row, order = local.sort(stable=True)
        ends = torch.searchsorted(of_row, torch.arange(num_experts, device=x.device), right=True).int()
        expert, rows = of_row.clamp(max=num_experts - 1), order // chosen.shape[1]
        inner = _biased(grouped_mm(x[rows], self.gate_up.transpose(1, 2), offs=ends), self.gate_up_bias, expert)
        inner = self.activate(inner)
        outputs = _biased(grouped_mm(inner, self.down.transpose(1, 2), offs=ends), self.down_bias, expert)
        weighted = outputs.float() * weights.flatten()[order, None]
        weighted = weighted.masked_fill((of_row == num_experts)[:, None], 0.0)  # there the products are undefined
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return mixed.index_add_(0, rows, weighted).to(x.dtype)


def _biased(products: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return products if bias is None else products + bias[expert]

"""Chooses experts for tokens. Shapes: T rows, N experts of the model, k chosen per row."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from engine.model_spec import RouterSpec


class Router:
    """Logits and scores in float32; the same on every rank."""

    def __init__(self, spec: RouterSpec, weight: Tensor, bias: Tensor | None, correction: Tensor | None) -> None:
        """`weight` [N, hidden], `bias` and `correction` [N]."""
        self._spec = spec
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()
        self._correction = None if correction is None else correction.float()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, k], and their weights [T, k] in float32."""
        spec = self._spec
        logits = linear(x.float(), self._weight, self._bias)
        scores = logits.sigmoid() if spec.scoring == "sigmoid" else logits.softmax(dim=-1)
        wanted = scores if self._correction is None else scores + self._correction
        if spec.num_groups > 1:
            wanted = self._within_best_groups(wanted)
        chosen = wanted.topk(spec.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if spec.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * spec.scale

    def _within_best_groups(self, wanted: Tensor) -> Tensor:
        """A group is as good as its best expert, or, with corrections, as its best two (DeepSeek-V3)."""
        grouped = wanted.view(len(wanted), self._spec.num_groups, -1)
        best = grouped.amax(dim=-1) if self._correction is None else grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(1, best.topk(self._spec.num_groups_kept, dim=-1).indices, value=True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)

"""A linear layer's weights, and how they are multiplied."""

from typing import Any

import torch
from torch import Tensor

_mkldnn: Any = torch.ops.mkldnn
_ROWS_HINT = 16  # the packed layout hardly depends on it


class Linear:
    """y = x W^T + b for a weight [outputs, inputs].

    On CPU the weight is repacked into oneDNN's blocked layout (the weight passed in is not kept): a product with few
    rows then reads memory about twice as fast as from rows, and with many rows it costs the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _can_pack(weight)
        self._weight = _mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, inputs] -> [rows, outputs]."""
        if self._packed:
            product: Tensor = _mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return torch.nn.functional.linear(x, self._weight, self._bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32

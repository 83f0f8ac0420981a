"""A linear layer's weights, and how they are multiplied."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from engine.arithmetic import arithmetic_dtype

_mkldnn: Any = torch.ops.mkldnn
_ROWS_HINT = 16  # libraries are slow at fewer; the packed layout hardly depends on it
_PIECE_ELEMENTS = 1 << 20
_SOME_ROWS = 64  # up to here widening takes longer than arithmetic
_FEW_ROWS = 4  # up to here reading the weight takes longer than emulated arithmetic with it


class Linear:
    """y = x W^T + b for a weight [outputs, inputs].

    On CPU the weight is repacked into oneDNN's blocked layout (the weight passed in is not kept): a product with few
    rows then reads memory about twice as fast as from rows, and with many rows it costs the same. Where the CPU only
    emulates arithmetic of the weight's dtype, products with more than a few rows widen weight and rows first.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, may_pack: bool = True) -> None:
        self.bias = bias
        self._packed = may_pack and _can_pack(weight)
        self._arithmetic = arithmetic_dtype(weight.device, weight.dtype)
        self._weight = _mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if self._packed else weight

    def rows(self) -> Tensor:
        """The weight [outputs, inputs] as it was passed in; a copy where it was repacked."""
        return self._weight.to_dense() if self._packed else self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, inputs] -> [rows, outputs]."""
        if self._packed:
            product: Tensor = _mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return product
        if self._arithmetic == x.dtype or len(x) <= _FEW_ROWS:
            return linear(x, self._weight, self.bias)
        product = _multiply_widened(x.to(self._arithmetic), self._weight)
        return (product if self.bias is None else product.add_(self.bias)).to(x.dtype)


def _multiply_widened(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x; for some rows, the weight is widened in pieces that stay in the cache until used."""
    if len(x) > _SOME_ROWS:
        return linear(x, weight.to(x.dtype))
    columns = pad(x, (0, 0, 0, -len(x) % _ROWS_HINT)).t().contiguous()
    product = torch.empty(len(weight), columns.shape[1], dtype=x.dtype)
    piece_rows = max(1, _PIECE_ELEMENTS // weight.shape[1])
    buffer = torch.empty(piece_rows, weight.shape[1], dtype=x.dtype)
    for start in range(0, len(weight), piece_rows):
        piece = weight[start : start + piece_rows]
        torch.mm(buffer[: len(piece)].copy_(piece), columns, out=product[start : start + len(piece)])
    return product.t()[: len(x)]


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    packable = weight.dtype in (torch.float32, torch.bfloat16)
    return packable and arithmetic_dtype(weight.device, weight.dtype) == weight.dtype

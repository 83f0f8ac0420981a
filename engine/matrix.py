"""How a weight is kept so that it multiplies fast on its device.

Shapes: W [outputs, inputs], x [rows, inputs].
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from engine.arithmetic import arithmetic_dtype
from engine.cpu_library import load_cpu_library
from engine.half_matrix import pack_halves
from engine.panel_matrix import PanelMatrix

_mkldnn: Any = torch.ops.mkldnn
_ROWS_HINT = 16  # libraries are slow at fewer; the blocked layout hardly depends on it


class Matrix(Protocol):
    """W and b."""

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T + b for x in the precision that the device computes in; so is the product."""
        ...

    def rows(self) -> Tensor:
        """W as it was passed in, bit by bit; a copy where it was repacked."""
        ...


def matrix_of(weight: Tensor, bias: Tensor | None) -> Matrix:
    """The fastest form; on CPU the weight passed in is not kept.

    There, packed weights are read about twice as fast as rows by a product with few rows of x. Where the CPU emulates
    arithmetic of the weight's dtype, compiled code of ours widens it while multiplying, or without a compiler FBGEMM;
    what suits neither is kept in float32.
    """
    arithmetic = arithmetic_dtype(weight.device, weight.dtype)
    if arithmetic != weight.dtype:
        bias = None if bias is None else bias.to(arithmetic)
        library = load_cpu_library() if weight.dtype == torch.bfloat16 else None
        if library is not None:
            return PanelMatrix(library, weight, bias)
        halves = pack_halves(weight, bias)
        if halves is not None:
            return halves
    if weight.device.type == "cpu" and _has_blocks(arithmetic):
        return BlockedMatrix(weight, bias, arithmetic)
    return PlainMatrix(weight, bias, arithmetic)


def plain_matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """The weight as rows, for memory that it may leave and come back to."""
    return PlainMatrix(weight, bias, arithmetic_dtype(weight.device, weight.dtype))


class PlainMatrix:
    """Rows, one after another."""

    def __init__(self, weight: Tensor, bias: Tensor | None, arithmetic: torch.dtype) -> None:
        self._dtype = weight.dtype
        self._weight, self._bias = weight.to(arithmetic), bias

    def multiply(self, x: Tensor) -> Tensor:
        """See Matrix."""
        return linear(x, self._weight, self._bias)

    def rows(self) -> Tensor:
        """See Matrix."""
        return self._weight.to(self._dtype)


class BlockedMatrix:
    """The layout of oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None, arithmetic: torch.dtype) -> None:
        self._dtype = weight.dtype
        self._blocks = _mkldnn._reorder_linear_weight(weight.to(arithmetic), _ROWS_HINT)
        self._bias = bias

    def multiply(self, x: Tensor) -> Tensor:
        """See Matrix."""
        product: Tensor = _mkldnn._linear_pointwise(x, self._blocks, self._bias, "none", [], "")
        return product

    def rows(self) -> Tensor:
        """See Matrix."""
        rows: Tensor = self._blocks.to_dense()
        return rows.to(self._dtype)


def _has_blocks(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

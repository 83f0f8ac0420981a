"""A matrix in half precision that a CPU without instructions for it multiplies in float32: FBGEMM's packed form.

FBGEMM reads 16-bit numbers and widens them in registers (F16C), so a product with few rows takes the time of reading
half as many bytes as float32 has, and one with many rows is no slower than with float32. It knows float16 alone, which
bfloat16 fits into but for its range: below 2**-17 numbers lose bits. Matrices in which that matters are not packed.
"""

from typing import Any

import torch
from torch import Tensor

_quantized: Any = torch.ops.quantized

_ENGINES = {"fbgemm", "x86"}
_NEGLIGIBLE = 2.0**-14  # of the matrix's norm: 1/32 of bfloat16's own rounding


class HalfMatrix:
    """W [outputs, inputs] of bfloat16 or float16, to be multiplied with rows of float32; a Matrix."""

    def __init__(self, weight: Tensor, wide: Tensor, changed: Tensor, bias: Tensor | None) -> None:
        """`wide`: the weight in float32; `changed`: flat indices of what float16 does not hold exactly."""
        self._dtype = weight.dtype
        self._packed = _quantized.linear_prepack_fp16(wide, bias)
        self._changed = changed
        self._originals = weight.flatten()[changed]

    def multiply(self, x: Tensor) -> Tensor:
        """See Matrix."""
        product: Tensor = _quantized.linear_dynamic_fp16.default(x, self._packed)
        return product

    def rows(self) -> Tensor:
        """See Matrix."""
        rows: Tensor = _quantized.linear_unpack_fp16(self._packed)[0].to(self._dtype)
        rows.view(-1)[self._changed] = self._originals
        return rows


def pack_halves(weight: Tensor, bias: Tensor | None) -> HalfMatrix | None:
    """The weight, and a bias in float32; None where FBGEMM is not there or float16 would change the weight too much."""
    if weight.dtype not in (torch.bfloat16, torch.float16) or torch.backends.quantized.engine not in _ENGINES:
        return None
    wide = weight.float()
    narrow = wide.half().float()
    changed = (narrow != wide).flatten().nonzero()[:, 0]
    lost = (narrow.flatten()[changed] - wide.flatten()[changed]).norm()  # infinite beyond float16's range
    return HalfMatrix(weight, wide, changed, bias) if lost <= _NEGLIGIBLE * wide.norm() else None

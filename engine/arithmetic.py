"""In which precision matrix products are computed."""

from typing import Any

import torch

_mkldnn: Any = torch.ops.mkldnn


def arithmetic_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where the device emulates its products.

    A CPU without AVX-512 multiplies half precision number by number: 8 times slower than float32 in large products,
    100 times in small ones of a batch. Widening is exact, so results differ by the rounding of sums alone.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.float32
    is_native = _mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else _mkldnn._is_mkldnn_fp16_supported
    return dtype if is_native() else torch.float32

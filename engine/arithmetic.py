"""In which precision a device computes."""

import platform
from typing import Any

import torch

from engine.cpu_library import load_cpu_library

_mkldnn: Any = torch.ops.mkldnn
_cpu: Any = torch.cpu


def arithmetic_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of activations of a model stored as `dtype`: that, or float32 where products are emulated, or compiled by us.

    Widening is exact, and what lies between products is rounded less.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and _has_pairs():
        return torch.float32
    return product_dtype(device, dtype)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of torch's products of what is stored as `dtype`: that, or float32 where the device emulates them.

    A CPU without instructions for them multiplies half precision number by number: 8 times slower than float32 in large
    products, 100 times in small ones of a batch.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if _multiplies(dtype) else torch.float32


def _has_pairs() -> bool:
    """Whether compiled products of bfloat16 are there and oneDNN has no better ones: with AMX it has."""
    if _cpu._is_amx_tile_supported():
        return False
    library = load_cpu_library()
    return library is not None and library.multiplies_pairs


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN and the processor both know the format; oneDNN takes AVX-512 alone for enough."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float16:
        return bool(_mkldnn._is_mkldnn_fp16_supported())
    has_instructions = platform.machine() not in ("x86_64", "AMD64") or _cpu._is_avx512_bf16_supported()
    return bool(has_instructions and _mkldnn._is_mkldnn_bf16_supported())

"""What bounds an engine on a device: reading memory, multiplying matrices, copying from the host."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.arithmetic import product_dtype


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Best wall time of `work`, the device idle before and after."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading memory much larger than any cache."""
    data = torch.ones(1 << 27, dtype=torch.int64 if device.type == "cpu" else torch.float32, device=device)
    return data.nbytes / seconds(data.sum, device, 8)


def measure_upload(device: torch.device) -> float:
    """Bytes/s of copies from pinned host memory."""
    host = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    return host.nbytes / seconds(lambda: there.copy_(host, non_blocking=True), device, 4)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, in the precision that torch is quickest in for numbers of `dtype`."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(product_dtype(device, dtype)) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 8)


@dataclass(frozen=True)
class Limits:
    """Of the device, measured."""

    read_bytes_per_s: float
    flop_per_s: float
    upload_bytes_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Limits":
        """In some seconds."""
        return cls(measure_bandwidth(device), measure_matmul(device, dtype), measure_upload(device))

"""What a GPU can do at most, and what lies between GPUs. Pure.

From NVIDIA's data sheets of H100 SXM and H200 SXM (dense rates) and of ConnectX-7.
"""

from dataclasses import dataclass
from enum import StrEnum

from core.errors import ConfigurationError
from simulator.cost.cost_model import Link


@dataclass(frozen=True)
class GpuSpec:
    """One GPU. Rates are per second, products of half precision with float32 sums."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    matmul_flops: float  # twice as many in float8


GPUS = {
    "h100": GpuSpec("h100", 80 * 2**30, 3.35e12, 989e12),
    "h200": GpuSpec("h200", 141 * 10**9, 4.8e12, 989e12),
}


class LinkKind(StrEnum):
    """What connects the GPUs of two replicas."""

    NVLINK = "nvlink"
    INFINIBAND = "infiniband"
    TCP = "tcp"


# One direction of one GPU's port at the speed that published transfers reach of the line: 71 to 82 % of 50 GB/s of
# 400 Gb/s InfiniBand (Mooncake's and DistServe's figures), 4.5 GB in 31.7 ms over NVLink; TCP of a 100 Gb/s port.
LINKS = {
    LinkKind.NVLINK: Link(142e9, 20e-6),
    LinkKind.INFINIBAND: Link(39e9, 50e-6),
    LinkKind.TCP: Link(8e9, 200e-6),
}


def gpu_spec(name: str) -> GpuSpec:
    """Raises ConfigurationError for a GPU that is not known."""
    if name not in GPUS:
        raise ConfigurationError(f"gpu {name!r} is not known; known are {', '.join(GPUS)}", field="gpu")
    return GPUS[name]

"""Peak arithmetic and memory bandwidth of a rank's device, and what a token costs of a model: where estimates start.

NVIDIA's data sheets, dense bfloat16 without sparsity. Other GPUs, and CPUs, get an estimate by their size; the
scheduler's estimates are replaced by measured steps soon.
"""

from typing import NamedTuple

import torch

from engine.model_spec import ModelSpec, MoeSpec


class DeviceSpeed(NamedTuple):
    """Of one device."""

    flop_per_s: float
    read_bytes_per_s: float


_GPUS = {  # by a part of their name, longer names first
    "H100 PCIe": DeviceSpeed(756e12, 2.0e12),
    "H100 NVL": DeviceSpeed(835e12, 3.9e12),
    "A100-SXM4-40": DeviceSpeed(312e12, 1.56e12),
    "A100": DeviceSpeed(312e12, 2.0e12),
    "H100": DeviceSpeed(989e12, 3.35e12),
    "H200": DeviceSpeed(989e12, 4.8e12),
    "B200": DeviceSpeed(2250e12, 8.0e12),
    "L40S": DeviceSpeed(362e12, 0.864e12),
    "L4": DeviceSpeed(121e12, 0.3e12),
}
_FLOP_PER_S_OF_MULTIPROCESSOR = 1.5e12  # a guess between an A100's and an H100's, low
_GPU_BYTES_PER_S = 5e11
_FLOP_PER_S_OF_THREAD = 4e10  # AVX2 at some 2.5 GHz, float32
_CPU_BYTES_PER_S_OF_THREAD = 1e10


def device_speed(device: torch.device, num_threads: int) -> DeviceSpeed:
    """`num_threads` of a CPU compute."""
    if device.type != "cuda":
        return DeviceSpeed(_FLOP_PER_S_OF_THREAD * num_threads, _CPU_BYTES_PER_S_OF_THREAD * num_threads)
    name = torch.cuda.get_device_name(device)
    known = next((speed for part, speed in _GPUS.items() if part in name), None)
    if known is not None:
        return known
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return DeviceSpeed(_FLOP_PER_S_OF_MULTIPROCESSOR * count, _GPU_BYTES_PER_S)


def num_active_parameters(spec: ModelSpec) -> int:
    """Weights that one token is multiplied with: of a mixture's experts, those that it goes to."""
    idle = 0
    for layer in spec.decoder.layers:
        if isinstance(layer.mlp, MoeSpec):
            router = layer.mlp.router
            idle += (router.num_experts - router.top_k) * 3 * spec.hidden_size * layer.mlp.expert.intermediate_size
    return max(1, spec.num_parameters - idle)

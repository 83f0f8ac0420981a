"""One rank's paged KV memory: [places_per_rank, num_blocks, num_planes, heads_per_rank, block_size, head_dim]."""

from pathlib import Path

import torch

from core.kv_budget import blocks_within, gpu_kv_bytes
from core.kv_layout import KVLayout
from engine.model_spec import ModelSpec
from engine.shared_memory import SharedMemory
from engine.weights import TORCH_DTYPES


class KVCache:
    """The blocks of one rank. Raises ConfigurationError when the machine has no room for `num_blocks`."""

    def __init__(self, layout: KVLayout, rank: int, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.heads = layout.heads_of_rank(rank)
        self._memory = SharedMemory(num_blocks * layout.block_bytes_per_rank, device, "KV cache")
        block = (layout.num_planes, layout.heads_per_rank, layout.block_size, layout.head_dim)
        self.tensor = self._memory.bytes.view(TORCH_DTYPES[layout.dtype]).view(
            layout.places_per_rank, num_blocks, *block
        )

    @property
    def path(self) -> Path | None:
        """See SharedMemory."""
        return self._memory.path

    def close(self) -> None:
        """See SharedMemory."""
        self._memory.close()
        self.tensor = self.tensor.new_empty(0)


def decide_num_blocks(
    spec: ModelSpec,
    layout: KVLayout,
    device: torch.device,
    num_blocks: int | None,
    kv_cache_mib: int,
    memory_fraction: float,
) -> int:
    """Blocks per rank: as told, else what `kv_cache_mib` holds (CPU) or a GPU's memory beside weights and a margin.

    Depends on nothing that differs between the ranks of a replica. Raises ConfigurationError for fewer than two.
    """
    if num_blocks is not None:
        return num_blocks
    if device.type == "cpu":
        budget_bytes = kv_cache_mib << 20
    else:
        weight_bytes = spec.geometry.weight_bytes_per_rank(layout)
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        budget_bytes = gpu_kv_bytes(memory_bytes, memory_fraction, weight_bytes)
    return blocks_within(layout, budget_bytes)

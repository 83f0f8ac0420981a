"""One rank's paged KV memory: [num_layers, num_blocks, 2, heads_per_rank, block_size, head_dim] (2: K, V).

On CPU under Linux it lies in a memory file without a name, which a peer process on this machine can map through /proc
and read without a copy through a socket. No name can be left behind: the memory goes with the last that maps it.
"""

import os
import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ConfigurationError
from core.kv_budget import blocks_within, gpu_kv_bytes
from core.kv_layout import KVLayout
from engine.checkpoint import ModelSpec
from engine.weights import TORCH_DTYPES


class KVCache:
    """The blocks of one rank. Raises ConfigurationError when the machine has no room for `num_blocks`."""

    def __init__(self, layout: KVLayout, rank: int, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.heads = layout.heads_of_rank(rank)
        shape = (layout.num_layers, num_blocks, 2, layout.heads_per_rank, layout.block_size, layout.head_dim)
        dtype = TORCH_DTYPES[layout.dtype]
        self._file: int | None = None
        if device.type == "cpu" and sys.platform == "linux":
            self._file = _allocate_shared(num_blocks * layout.block_bytes_per_rank)
            self.tensor: Tensor = torch.from_file(str(self.path), shared=True, size=prod(shape), dtype=dtype).view(
                shape
            )
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def path(self) -> Path | None:
        """The memory as a file that peers of this host can map while this process lives; None where there is none."""
        return Path(f"/proc/{os.getpid()}/fd/{self._file}") if self._file is not None else None

    def close(self) -> None:
        """Peers can map it no more; the memory goes with the last tensor that views it. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
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
        weight_bytes = spec.geometry.weight_bytes_per_rank(layout.tensor_parallel)
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        budget_bytes = gpu_kv_bytes(memory_bytes, memory_fraction, weight_bytes)
    return blocks_within(layout, budget_bytes)


def _allocate_shared(num_bytes: int) -> int:
    """A memory file of zeros, every page taken now rather than with SIGBUS later; returns its descriptor."""
    available_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = os.memfd_create("baton-kv")
    try:
        if num_bytes > available_bytes:
            raise OSError(f"the machine has {available_bytes >> 20} MiB")
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.close(file)
        raise ConfigurationError(f"no memory for {num_bytes >> 20} MiB of KV cache: {error}") from error
    return file

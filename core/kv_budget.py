"""How many KV blocks fit: the arithmetic that an engine starts with and that `baton check` predicts."""

from core.errors import ConfigurationError
from core.kv_layout import KVLayout

ACTIVATION_MARGIN_BYTES = 1 << 30  # of a GPU: workspaces, activations
NCCL_PAIR_BYTES = 52 * 10**6  # of a GPU: one communicator of two ranks at 8 thread blocks
_NUM_SLABS = {"gloo": 2, "nccl": 2, "in_process": 2, "cuda_ipc": 1, "nixl": 1}  # beside the pool, at one end


def channel_bytes(kind: str, slab_bytes: int) -> int:
    """Memory that one end of one channel of a transport takes beside the KV pool."""
    return _NUM_SLABS.get(kind, 0) * slab_bytes + (NCCL_PAIR_BYTES if kind == "nccl" else 0)


def gpu_kv_bytes(memory_bytes: int, memory_fraction: float, weight_bytes: int) -> int:
    """What a GPU of `memory_bytes` leaves for KV beside one rank's weights and the margin; negative when nothing."""
    return int(memory_bytes * memory_fraction) - weight_bytes - ACTIVATION_MARGIN_BYTES


def blocks_within(layout: KVLayout, budget_bytes: int) -> int:
    """Blocks of one rank that `budget_bytes` hold. Raises ConfigurationError for fewer than two."""
    found = budget_bytes // layout.block_bytes_per_rank
    if found < 2:
        raise ConfigurationError(
            f"{max(0, budget_bytes) >> 20} MiB for the KV cache hold {max(0, found)} blocks of "
            f"{layout.block_bytes_per_rank} bytes; at least 2 are needed"
        )
    return found

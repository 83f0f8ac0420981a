"""What one rank of a pool allocates (pure)."""

from dataclasses import dataclass

from cluster.check.node_types import degrees_of
from core.channel_kinds import Device, offered_kinds
from core.config import PoolConfig, TransferConfig
from core.errors import ConfigurationError
from core.kv_budget import ACTIVATION_MARGIN_BYTES, blocks_within, channel_bytes, gpu_kv_bytes
from core.kv_layout import KVLayout
from core.model_geometry import ModelGeometry
from kv_transfer.plan import source_ranks

PROCESS_BYTES = 192 << 20  # of a host: a rank's process with torch, before it loads anything


@dataclass(frozen=True)
class RankMemory:
    """Bytes by purpose; `num_channels` pairs at most, with all replicas of the other pool up."""

    weight_bytes: int
    num_blocks: int
    kv_bytes: int
    num_channels: int
    channel_bytes: int  # of all of them
    reserve_bytes: int  # activations on a GPU; on a host the process itself and the tier in host memory

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.channel_bytes + self.reserve_bytes


def size_rank(
    pool: PoolConfig,
    layout: KVLayout,
    geometry: ModelGeometry,
    num_parameters: int | None,
    memory_bytes: int,
    num_channels: int,
    transfer: TransferConfig,
) -> RankMemory:
    """`num_parameters`: counted in the weight files, where there are any; the engine's KV budget goes by the formula.

    Raises ConfigurationError when the weights alone do not fit, or fewer than two blocks do.
    """
    weight_bytes = geometry.weight_bytes_per_rank(layout)
    found_bytes = weight_bytes * (num_parameters or geometry.num_parameters) // geometry.num_parameters
    budget_bytes = pool.engine.device_weight_bytes
    if budget_bytes is not None:  # layers beyond it stay on the host
        weight_bytes, found_bytes = min(weight_bytes, budget_bytes), min(found_bytes, budget_bytes)
    limit_bytes = int(memory_bytes * (pool.memory_fraction if pool.device == "cuda" else 1))
    if found_bytes > limit_bytes:
        raise ConfigurationError(
            f"{gib(found_bytes)} of weights per rank at {degrees_of(pool)} exceed {gib(limit_bytes)} of its memory",
            field="tensor_parallel",
        )
    if pool.num_blocks is not None:
        num_blocks = pool.num_blocks
    elif pool.device == "cuda":
        num_blocks = blocks_within(layout, gpu_kv_bytes(memory_bytes, pool.memory_fraction, weight_bytes))
    else:
        num_blocks = blocks_within(layout, pool.kv_cache_mib << 20)
    return RankMemory(
        weight_bytes=found_bytes,
        num_blocks=num_blocks,
        kv_bytes=num_blocks * layout.block_bytes_per_rank,
        num_channels=num_channels,
        channel_bytes=min(
            num_channels * largest_channel_bytes(transfer, layout, pool.device), int(transfer.pairs_mib * 2**20)
        ),
        reserve_bytes=ACTIVATION_MARGIN_BYTES if pool.device == "cuda" else _process_bytes(pool),
    )


def _process_bytes(pool: PoolConfig) -> int:
    return PROCESS_BYTES + int(pool.tiers.host_mib * 2**20)


def largest_channel_bytes(transfer: TransferConfig, layout: KVLayout, device: Device) -> int:
    """One end of one channel; of a transport that is chosen per pair of ranks, the largest that may be."""
    slab_bytes = max(int(transfer.slab_mib * 2**20), layout.cell_bytes)  # one layer of one block is never cut
    kinds = offered_kinds(transfer.channel, device)
    return max((channel_bytes(kind, slab_bytes) for kind in kinds), default=0)


def count_channels(prefill: KVLayout, decode: KVLayout) -> tuple[int, int]:
    """Channels of the busiest prefill rank to one decode replica, and of the busiest decode rank to one prefill
    replica: pairs of ranks whose layers and KV heads, or shares of latents, overlap.
    """
    sources = [set(source_ranks(prefill, decode, rank)) for rank in range(decode.num_ranks)]
    senders = [sum(rank in found for found in sources) for rank in range(prefill.num_ranks)]
    return max(senders), max(map(len, sources))


def count_sibling_channels(layout: KVLayout) -> int:
    """Channels of a rank to and from the others of its stage, among which latents are handed on."""
    return 2 * (layout.tensor_parallel - 1) if layout.latent else 0


def gib(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.1f} GiB"

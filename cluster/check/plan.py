"""From a configuration and a model's sizes to what every rank allocates and what cannot work (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.check.agreement import disagreements, dtype_of
from cluster.check.node_types import NodeType, require_room
from cluster.check.rank_memory import RankMemory, count_channels, count_sibling_channels, gib, size_rank
from core.config import BatonConfig, PoolConfig
from core.errors import ConfigurationError
from core.kv_layout import KVLayout
from core.model_geometry import ModelGeometry

# As torch reports a device's memory, GiB; below what the name says. Names are Ray's accelerator types.
GPU_MEMORY_GIB = {
    "A100": 39.4,
    "A100-40G": 39.4,
    "A100-80G": 79.1,
    "B200": 178.3,
    "H100": 79.1,
    "H200": 139.0,
    "L4": 22.0,
}
GPUS_PER_NODE = 8  # where no cluster file says it


@dataclass(frozen=True)
class Hardware:
    """`memory_gib` (of a GPU, or of the host for pools on CPU) overrides the table; no `node_types`: not known."""

    host_bytes: int
    memory_gib: float | None = None
    node_types: Sequence[NodeType] = ()


@dataclass(frozen=True)
class PoolPlan:
    """One pool's ranks, all alike."""

    name: str
    pool: PoolConfig
    layout: KVLayout
    rank: RankMemory
    memory_bytes: int

    @property
    def num_tokens(self) -> int:
        """KV capacity of one replica: of one sequence, where layers with a window keep less than the others."""
        return self.longest(self.rank.num_blocks * self.layout.block_size)

    def longest(self, limit: int) -> int:
        """Tokens of the longest sequence that a replica holds, `limit` at most."""
        return self.layout.longest_within(self.rank.num_blocks, self.pool.num_at_once, limit)

    @property
    def num_ranks(self) -> int:
        """With all replicas up."""
        return self.pool.max_replicas * self.pool.num_ranks


@dataclass(frozen=True)
class Plan:
    """`pools` lacks those that cannot be sized; no `problems`: it fits."""

    pools: tuple[PoolPlan, ...]
    problems: tuple[ConfigurationError, ...]


def make_plan(config: BatonConfig, geometry: ModelGeometry, num_parameters: int | None, hardware: Hardware) -> Plan:
    """Every problem names its field and limit. `num_parameters` as in `size_rank`."""
    problems = list(disagreements(config, geometry))
    pools = {"prefill": config.prefill, "decode": config.decode}
    try:
        layouts = {name: split_model(name, pool, config, geometry) for name, pool in pools.items()}
    except ConfigurationError as error:
        return Plan((), (*problems, error))
    channels = _channels(config, layouts)
    sized = []
    for name, pool in pools.items():
        try:
            memory_bytes = _memory_bytes(pool, hardware)
            typed = replace(geometry, dtype=layouts[name].dtype)
            rank = size_rank(pool, layouts[name], typed, num_parameters, memory_bytes, channels[name], config.transfer)
        except ConfigurationError as error:
            problems.append(ConfigurationError(error.message, field=f"{name}.{error.field or _kv_field(pool)}"))
            continue
        sized.append(PoolPlan(name, pool, layouts[name], rank, memory_bytes))
    needed = config.model.max_model_len or geometry.max_model_len
    problems += [problem for plan in sized for problem in _shortages(plan, needed)]
    problems += _host_shortage([plan for plan in sized if plan.pool.device == "cpu"])
    problems += _no_room(pools, hardware)
    return Plan(tuple(sized), tuple(problems))


def _channels(config: BatonConfig, layouts: dict[str, KVLayout]) -> dict[str, int]:
    """Of the busiest rank of each pool, with all replicas of the other up."""
    if layouts["prefill"].dtype != layouts["decode"].dtype:
        return dict.fromkeys(layouts, 0)  # a problem already
    to_decode, to_prefill = count_channels(layouts["prefill"], layouts["decode"])
    return {
        "prefill": to_decode * config.decode.max_replicas,
        "decode": to_prefill * config.prefill.max_replicas + count_sibling_channels(layouts["decode"]),
    }


def split_model(name: str, pool: PoolConfig, config: BatonConfig, geometry: ModelGeometry) -> KVLayout:
    """How a pool's ranks share the model. Raises ConfigurationError with the field at fault."""
    typed = replace(geometry, dtype=dtype_of(pool, config, geometry))
    try:
        return typed.kv_layout(pool.tensor_parallel, config.block_size, pool.pipeline_parallel)
    except ConfigurationError as error:
        raise ConfigurationError(error.message, field=f"{name}.{error.field}") from error


def _memory_bytes(pool: PoolConfig, hardware: Hardware) -> int:
    if hardware.memory_gib is not None:
        return int(hardware.memory_gib * 2**30)
    if pool.device == "cpu":
        return hardware.host_bytes
    name = pool.resources_per_rank.accelerator_type or ""
    if name not in GPU_MEMORY_GIB:
        raise ConfigurationError(
            f"{name!r} has no known memory; known are {', '.join(GPU_MEMORY_GIB)}; or give --memory-gib",
            field="resources_per_rank.accelerator_type",
        )
    return int(GPU_MEMORY_GIB[name] * 2**30)


def _kv_field(pool: PoolConfig) -> str:
    """The field that decides how many blocks there are."""
    if pool.num_blocks is not None:
        return "num_blocks"
    return "memory_fraction" if pool.device == "cuda" else "kv_cache_mib"


def _shortages(plan: PoolPlan, needed_tokens: int) -> list[ConfigurationError]:
    found = []
    longest = plan.longest(needed_tokens)
    if longest < needed_tokens:
        message = (
            f"{plan.rank.num_blocks} blocks hold {longest} tokens, fewer than the {needed_tokens} of "
            "model.max_model_len"
        )
        found.append(ConfigurationError(message, field=f"{plan.name}.{_kv_field(plan.pool)}"))
    if plan.rank.total_bytes > plan.memory_bytes:
        message = (
            f"a rank takes {gib(plan.rank.total_bytes)} of {gib(plan.memory_bytes)}, with "
            f"{gib(plan.rank.kv_bytes)} of KV and {gib(plan.rank.channel_bytes)} for {plan.rank.num_channels} channels"
        )
        found.append(ConfigurationError(message, field=f"{plan.name}.{_kv_field(plan.pool)}"))
    return found


def _host_shortage(plans: Sequence[PoolPlan]) -> list[ConfigurationError]:
    """Pools on CPU share one host's memory."""
    total_bytes = sum(plan.num_ranks * plan.rank.total_bytes for plan in plans)
    if not plans or total_bytes <= plans[0].memory_bytes:
        return []
    ranks = sum(plan.num_ranks for plan in plans)
    message = f"{ranks} ranks take {gib(total_bytes)} of the host's {gib(plans[0].memory_bytes)}"
    return [ConfigurationError(message, field="prefill.max_replicas, decode.max_replicas")]


def _no_room(pools: dict[str, PoolConfig], hardware: Hardware) -> list[ConfigurationError]:
    if hardware.node_types:
        try:
            require_room(pools, hardware.node_types)
        except ConfigurationError as error:
            return [error]
        return []
    return [
        ConfigurationError(
            f"{pool.num_ranks} GPUs, but a replica lies on one node, taken to have {GPUS_PER_NODE}; "
            "--cluster-file names others",
            field=f"{name}.{'pipeline' if pool.pipeline_parallel > 1 else 'tensor'}_parallel",
        )
        for name, pool in pools.items()
        if pool.device == "cuda" and pool.num_ranks > GPUS_PER_NODE
    ]

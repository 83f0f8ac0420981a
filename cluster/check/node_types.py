"""Whether the nodes that a cluster file allows can hold all replicas (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.config import PoolConfig
from core.errors import ConfigurationError


@dataclass(frozen=True)
class NodeType:
    """`resources` of one node, and how many nodes there may be."""

    name: str
    resources: dict[str, float]
    max_nodes: int


def read_node_types(cluster: dict[str, Any]) -> tuple[NodeType, ...]:
    """Of a `ray up` file. Raises ConfigurationError where it names none, as with `provider: {type: local}`."""
    types = cluster.get("available_node_types")
    if not isinstance(types, dict):
        raise ConfigurationError("the cluster file has no available_node_types", field="available_node_types")
    limit, head = int(cluster.get("max_workers", 0)), cluster.get("head_node_type")
    return tuple(
        NodeType(
            name,
            entry.get("resources", {}),
            1 + entry.get("max_workers", 0) if name == head else min(limit, entry.get("max_workers", limit)),
        )
        for name, entry in types.items()
    )


def require_room(pools: Mapping[str, PoolConfig], types: Sequence[NodeType]) -> None:
    """Places `max_replicas` of every pool, each replica on one node, those with most GPUs first.

    Raises ConfigurationError naming the pool that does not fit.
    """
    free = [dict(node_type.resources) for node_type in types for _ in range(node_type.max_nodes)]
    for name, pool in sorted(pools.items(), key=lambda item: -_demand(item[1]).get("GPU", 0)):
        demand = _demand(pool)
        for placed in range(pool.max_replicas):
            node = next((n for n in free if all(n.get(what, 0) >= much for what, much in demand.items())), None)
            if node is None:
                nodes = ", ".join(f"{node_type.max_nodes} x {node_type.name}" for node_type in types)
                raise ConfigurationError(
                    f"the nodes of the cluster ({nodes}) hold {placed} replicas of "
                    f"{degrees_of(pool)}, not max_replicas {pool.max_replicas}",
                    field=f"{name}.max_replicas",
                )
            for what, much in demand.items():
                node[what] -= much


def _demand(pool: PoolConfig) -> dict[str, float]:
    """Resources of one replica."""
    asked = pool.resources_per_rank
    per_rank = {"CPU": asked.num_cpus, "GPU": asked.num_gpus, **asked.custom}
    if asked.accelerator_type:
        per_rank[f"accelerator_type:{asked.accelerator_type}"] = 0.001
    return {what: much * pool.num_ranks for what, much in per_rank.items() if much}


def degrees_of(pool: PoolConfig) -> str:
    """How a replica is split, for people."""
    pipeline = f" x pipeline_parallel {pool.pipeline_parallel}" if pool.pipeline_parallel > 1 else ""
    return f"tensor_parallel {pool.tensor_parallel}{pipeline}"

"""`baton check`: reads files, prints what every rank will allocate, refuses what cannot work."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.check.checkpoint_size import count_parameters
from cluster.check.node_types import read_node_types
from cluster.check.plan import Hardware, Plan, make_plan
from cluster.settings import laptop_config_path, resolve_config
from core.config import PoolConfig, read_yaml
from core.errors import ConfigurationError
from core.model_geometry import read_geometry
from core.serve_file import require_same_http


def run_check(
    path: Path | None, model: Path | None, memory_gib: float | None, cluster_file: Path | None, console: Console
) -> None:
    """Prints the plan. Raises ConfigurationError that names every field that is wrong, with its limit."""
    config = resolve_config(path, model)
    require_same_http(read_yaml(path or laptop_config_path()), config.ingress.host, config.ingress.port)
    folder = Path(config.model.path)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    node_types = read_node_types(read_yaml(cluster_file)) if cluster_file else ()
    num_parameters = count_parameters(folder)
    plan = make_plan(config, read_geometry(folder), num_parameters, Hardware(host_bytes, memory_gib, node_types))
    if plan.pools:
        console.print(_table(plan))
    source = "formula: the folder holds no weights yet" if num_parameters is None else "headers of the weight files"
    console.print(f"model {folder}; weights by the {source}; channels with all replicas up")
    if plan.problems:
        raise ConfigurationError("; ".join(f"{problem.field}: {problem.message}" for problem in plan.problems))
    console.print("[green]it fits[/green]")


def _table(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("one rank", *(pool.name for pool in plan.pools)):
        table.add_column(name)
    rows: dict[str, list[str]] = {
        "device": [pool.pool.device for pool in plan.pools],
        "replicas": [f"{pool.pool.max_replicas} x {_degrees(pool.pool)}" for pool in plan.pools],
        "tokens of a replica": [str(pool.num_tokens) for pool in plan.pools],
        "weights": [_gib(pool.rank.weight_bytes) for pool in plan.pools],
        "KV": [f"{_gib(pool.rank.kv_bytes)} in {pool.rank.num_blocks} blocks" for pool in plan.pools],
        "channels": [f"{_gib(pool.rank.channel_bytes)} for {pool.rank.num_channels}" for pool in plan.pools],
        "reserve": [_gib(pool.rank.reserve_bytes) for pool in plan.pools],
        "total": [f"{_gib(pool.rank.total_bytes)} of {_gib(pool.memory_bytes)}" for pool in plan.pools],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _degrees(pool: PoolConfig) -> str:
    stages = f"PP {pool.pipeline_parallel} x " if pool.pipeline_parallel > 1 else ""
    return f"{stages}TP {pool.tensor_parallel}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

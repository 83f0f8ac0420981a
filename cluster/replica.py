"""What every Serve replica of ours does first."""

from pathlib import Path

import ray

from cluster.loopback import bind_serve_replica_to_loopback
from core.config import BatonConfig
from core.telemetry import configure_logging


def prepare_replica(config: BatonConfig, name: str) -> str:
    """First thing in every Serve replica of ours: log file, loopback; returns the address to bind."""
    if config.cluster.log_dir:
        configure_logging(str(Path(config.cluster.log_dir) / f"{name}.log"))
    if config.cluster.address != "local":
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    bind_serve_replica_to_loopback()
    return "127.0.0.1"

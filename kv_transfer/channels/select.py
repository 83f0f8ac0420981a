"""Makes the connector that the configuration names."""

from pathlib import Path

from torch import Tensor

from core.config import TransferConfig
from core.errors import ConfigurationError
from kv_transfer.channels.protocol import Connector


def make_connectors(
    config: TransferConfig, host: str, pool: Tensor, pool_path: Path | None = None
) -> tuple[Connector, ...]:
    """In order of preference."""
    return (make_connector(config, host, pool, pool_path),)


def make_connector(config: TransferConfig, host: str, pool: Tensor, pool_path: Path | None = None) -> Connector:
    """`host` is an address of this machine that peers can reach; `pool` the rank's KV pool.

    `pool_path` is the shared-memory file that holds a CPU pool; only channel "shared_memory" needs it. Raises
    ConfigurationError when a channel does not fit the pool. Backends are imported on demand: a torch built without
    CUDA has no NCCL.
    """
    if config.channel == "shared_memory":
        from kv_transfer.channels.shared_memory import SharedMemoryConnector

        if pool_path is None or pool.is_cuda:
            raise ConfigurationError("channel shared_memory needs a KV pool in shared memory", field="channel")
        return SharedMemoryConnector(pool, pool_path)
    if pool.is_cuda != (config.channel == "nccl"):
        raise ConfigurationError(f"channel {config.channel} cannot carry a pool on {pool.device}", field="channel")
    if config.channel == "nccl":
        from kv_transfer.channels.nccl import nccl_connector

        return nccl_connector(host, pool, config.connect_timeout_s)
    from kv_transfer.channels.gloo import gloo_connector

    return gloo_connector(host, pool, config.connect_timeout_s)

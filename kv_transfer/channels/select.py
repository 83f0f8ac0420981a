"""Makes the connectors that the configuration names, on the devices and hosts where they work.

Backends are imported on demand: a torch built without CUDA has no NCCL, and NIXL is an extra.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from core.channel_kinds import ChannelKind, offered_kinds
from core.config import TransferConfig
from core.errors import ConfigurationError
from kv_transfer.channels.protocol import Connector

Connect = Callable[[TransferConfig, str, Tensor, Path | None], Sequence[Connector]]  # see make_connectors

log = logging.getLogger(__name__)

_TWO_SIDED = ("gloo", "tcp", "nccl")


@dataclass(frozen=True)
class _Rank:
    host: str
    pool: Tensor
    pool_path: Path | None
    connect_timeout_s: float


def make_connectors(
    config: TransferConfig, host: str, pool: Tensor, pool_path: Path | None = None
) -> tuple[Connector, ...]:
    """All that the rank offers its peers, in order of preference, never none.

    `host` is an address of this machine that peers can reach; `pool` the rank's KV pool; `pool_path` the
    shared-memory file that holds a CPU pool, where there is one. Of "auto" and "measured", kinds that do not work here
    are left out. Raises ConfigurationError when a kind that is named does not, or none is left.
    """
    rank = _Rank(host, pool, pool_path, config.connect_timeout_s)
    kinds = offered_kinds(config.channel, "cuda" if pool.is_cuda else "cpu")
    if config.wire_dtype:  # one-sided channels read what is stored
        kinds = tuple(kind for kind in kinds if kind in _TWO_SIDED)
    if not kinds:
        as_what = f" as {config.wire_dtype}" if config.wire_dtype else ""
        raise ConfigurationError(
            f"channel {config.channel} cannot carry a pool on {pool.device}{as_what}", field="channel"
        )
    if len(kinds) == 1:
        return (_make(kinds[0], rank),)
    return _all_that_work(kinds, rank)


def _all_that_work(kinds: tuple[ChannelKind, ...], rank: _Rank) -> tuple[Connector, ...]:
    made = []
    for kind in kinds:
        try:
            made.append(_make(kind, rank))
        except ConfigurationError as error:
            log.info("no channels of kind %s: %s", kind, error)
    if not made:
        raise ConfigurationError(f"none of {', '.join(kinds)} works on {rank.host}", field="channel")
    return tuple(made)


def _make(kind: ChannelKind, rank: _Rank) -> Connector:
    """Raises ConfigurationError, whatever the reason."""
    try:
        return _import_and_make(kind, rank)
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigurationError(f"channel {kind} does not work on {rank.host}: {error}", field="channel") from error


def _import_and_make(kind: ChannelKind, rank: _Rank) -> Connector:
    match kind:
        case "shared_memory":
            from kv_transfer.channels.shared_memory import SharedMemoryConnector

            if rank.pool_path is None:
                raise ConfigurationError("channel shared_memory needs a KV pool in shared memory", field="channel")
            return SharedMemoryConnector(rank.pool, rank.pool_path)
        case "cuda_ipc":
            from kv_transfer.channels.cuda_ipc import CudaIpcConnector

            return CudaIpcConnector(rank.pool)
        case "nixl":
            from kv_transfer.channels.nixl import NixlConnector

            return NixlConnector(rank.pool)
        case "nccl":
            from kv_transfer.channels.nccl import nccl_connector

            return nccl_connector(rank.host, rank.pool, rank.connect_timeout_s)
        case "tcp":
            from kv_transfer.channels.tcp import TcpConnector

            return TcpConnector(rank.host, rank.pool, rank.connect_timeout_s)
        case "gloo":
            from kv_transfer.channels.gloo import gloo_connector

            return gloo_connector(rank.host, rank.pool, rank.connect_timeout_s)
        case _:
            raise ConfigurationError(f"channel {kind} is a choice among others, not a transport", field="channel")

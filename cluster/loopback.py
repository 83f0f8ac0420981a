"""Keeps a local fleet's ports on loopback where Ray Serve offers no setting for it."""

from collections.abc import Callable
from typing import Any


def bind_serve_replica_to_loopback() -> None:
    """Serve opens a port for calls between deployments on all interfaces of every replica; called in the replica's
    constructor, before that happens, this moves it to 127.0.0.1.
    """
    from ray.serve._private import replica

    bind: Callable[[Any, str], int] = replica.add_port_to_grpc_server  # type: ignore[attr-defined]

    def bind_to_loopback(server: Any, address: str) -> int:
        return bind(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = bind_to_loopback  # type: ignore[attr-defined]

"""Empties a node of the Ray cluster before it goes: the hook for spot notices and maintenance.

Ray places nothing new on a node that drains. Serve starts a replacement elsewhere for each of its replicas, and stops
the old one when the new one runs, or when it must to be gone by the deadline; stopped, a replica leaves as ever: it
drains. Call it from what hears the provider's notice (the metadata service of AWS or GCP, scheduled events of Azure):

    baton drain --deadline-s 120        # on the node itself; AWS gives two minutes, GCP and Azure half of one

A SIGTERM to `ray start --block`, as Kubernetes sends it, has Ray do the same to its own node, for as long as
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S says.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from core.errors import ConfigurationError, InvalidParameter

logger = logging.getLogger(__name__)

GCS_TIMEOUT_S = 2.0
HEAD = "node:__internal_head__"  # Ray's mark among a node's resources


def drain_node(node: str, deadline_s: float, reason: str) -> str:
    """Tells Ray that a node (address, name or id; empty: this one) will be gone in `deadline_s`; returns its address.

    Returns at once. Raises InvalidParameter when no one node is meant or it is the head, ConfigurationError when no
    cluster answers or Ray refuses.
    """
    if deadline_s <= 0:
        raise InvalidParameter(f"deadline-s is {deadline_s:g}, it must be positive", field="deadline-s")
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigurationError(f"no Ray cluster on this host: {error}", field="node") from error
    try:
        wanted = node or ray.get_runtime_context().get_node_id()
        found = find_node(wanted, ray.nodes())  # type: ignore[no-untyped-call]
        _announce(found["NodeID"], deadline_s, reason)
    finally:
        if is_ours:
            ray.shutdown()
    return str(found["NodeManagerAddress"])


def seconds_until_node_goes() -> float:
    """By the deadline of this process's node; infinite when the node does not drain, or nobody can tell. Blocks."""
    import ray

    context = ray.get_runtime_context()
    try:
        deadlines_ms = _gcs().get_draining_nodes(timeout=GCS_TIMEOUT_S)
    except ray.exceptions.RpcError as error:
        logger.warning("cannot ask for draining nodes: %s", error)
        return inf
    deadline_ms = deadlines_ms.get(context.get_node_id(), 0)
    return deadline_ms / 1000 - time.time() if deadline_ms else inf


def find_node(wanted: str, nodes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one live node of that address, name or id. Raises InvalidParameter."""
    alive = [node for node in nodes if node["Alive"]]
    found = [n for n in alive if wanted in (n["NodeManagerAddress"], n["NodeManagerHostname"], n["NodeID"])]
    if len(found) != 1:
        those = ", ".join(f"{n['NodeManagerAddress']} ({n['NodeManagerHostname']}, {n['NodeID']})" for n in alive)
        raise InvalidParameter(f"{len(found)} nodes are called {wanted}; alive are {those}", field="node")
    if HEAD in found[0]["Resources"]:
        raise InvalidParameter(f"{wanted} is the head, the cluster goes with it: `baton down` drains it", field="node")
    return found[0]


def _announce(node_id: str, deadline_s: float, reason: str) -> None:
    """What `ray drain-node` does. As a preemption, since Ray may refuse what is none."""
    from ray.core.generated import autoscaler_pb2

    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    accepted, refusal = _gcs().drain_node(node_id, preemption, reason, int((time.time() + deadline_s) * 1000))
    if not accepted:
        raise ConfigurationError(f"Ray does not drain node {node_id}: {refusal}", field="node")


def _gcs() -> Any:
    import ray

    return ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # type: ignore[attr-defined]

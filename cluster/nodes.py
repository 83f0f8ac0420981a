"""The machines of the Ray cluster that this process is part of."""

from typing import Any


def list_nodes() -> list[dict[str, Any]]:
    """Id, address, name, liveness, resources and labels of each node, dead ones included."""
    import ray

    return [
        {
            "id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "hostname": node["NodeManagerHostname"],
            "alive": node["Alive"],
            "resources": {
                name: amount for name, amount in sorted(node["Resources"].items()) if not name.startswith("node:")
            },
            "labels": node.get("Labels", {}),
        }
        for node in ray.nodes()  # type: ignore[no-untyped-call]
    ]

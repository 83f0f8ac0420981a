"""Changes the number of a pool's replicas while it serves."""

from cluster.names import POOL_NAMES, pools_name
from core.messages.fleet import Role


def resize_pool(generation: str, role: Role, num_replicas: int) -> None:
    """Sets the target; returns at once. Replicas that go drain first. The application runs with an external scaler.

    This is what Serve's REST endpoint for scaling does; the local fleet has no dashboard to offer it.
    """
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "no application is served from this process"
    deployment = DeploymentID(POOL_NAMES[role], pools_name(generation))
    ray.get(client._controller.update_deployment_replicas.remote(deployment, num_replicas))

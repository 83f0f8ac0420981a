"""Reads and changes the number of a pool's replicas while it serves."""

import asyncio
from collections.abc import Callable
from typing import Any

from cluster.names import POOL_NAMES, pools_name
from core.errors import PeerLost
from core.messages.fleet import Role

CALL_TIMEOUT_S = 10.0


def resize_pool(generation: str, role: Role, num_replicas: int) -> None:
    """Sets the target; returns at once. Replicas that go drain first. The application runs with an external scaler.

    This is what Serve's REST endpoint for scaling does; the local fleet has no dashboard to offer it.
    Raises PeerLost when Serve's controller does not do it.
    """
    from ray.serve._private.common import DeploymentID

    deployment = DeploymentID(POOL_NAMES[role], pools_name(generation))
    _ask_controller(lambda controller: controller.update_deployment_replicas.remote(deployment, num_replicas))


def pool_targets(generation: str) -> dict[Role, int]:
    """The targets that Serve follows now. Raises PeerLost, also while the application is being deployed."""
    details = _ask_controller(lambda controller: controller.get_serve_instance_details.remote())
    try:
        deployments = details["applications"][pools_name(generation)]["deployments"]
        return {role: int(deployments[name]["target_num_replicas"]) for role, name in POOL_NAMES.items()}
    except KeyError as error:
        raise PeerLost(f"Serve does not know {error} yet") from error


def _ask_controller(call: Callable[[Any], Any]) -> Any:
    import ray
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client = _get_global_client()
        assert client is not None, "no application is served from this process"
        return ray.get(call(client._controller), timeout=CALL_TIMEOUT_S)
    except (ray.exceptions.RayError, RayServeException) as error:
        raise PeerLost(f"Serve's controller does not answer: {error}") from error


class PoolScaler:
    """Both pools of one generation, for callers on an event loop, Serve replicas too."""

    def __init__(self, generation: str) -> None:
        self._generation = generation

    async def resize(self, role: Role, num_replicas: int) -> None:
        """See resize_pool."""
        await asyncio.to_thread(resize_pool, self._generation, role, num_replicas)

    async def targets(self) -> dict[Role, int]:
        """See pool_targets."""
        return await asyncio.to_thread(pool_targets, self._generation)

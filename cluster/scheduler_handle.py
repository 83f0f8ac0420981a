"""How other replicas reach the global scheduler's through Serve."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.names import FRONT_NAME, SCHEDULER_NAME
from core.errors import PeerLost


def find_scheduler(name: str = SCHEDULER_NAME) -> Any:
    """Serve's handle. Raises RayServeException while the front is not deployed."""
    return serve.get_deployment_handle(name, FRONT_NAME)


@asynccontextmanager
async def reaching_scheduler(timeout_s: float | None = None) -> AsyncIterator[None]:
    """Raises PeerLost when a call to the handle inside fails or takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
        raise PeerLost(f"Serve does not reach the global scheduler: {error}") from error

"""The Serve replica of the ingress. What it builds is imported when it starts: the process that deploys needs none."""

import asyncio
import secrets
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cluster.nodes import list_nodes
from cluster.replica import prepare_replica
from cluster.scheduler_handle import reaching_scheduler
from core.config import BatonConfig


class Ingress:
    """Serve's replica around the FastAPI app."""

    async def __init__(self, config: BatonConfig, *schedulers: Any) -> None:  # type: ignore[misc]
        prepare_replica(config, "ingress")
        from cluster.ingress.orchestrator import Fleet, Orchestrator
        from cluster.ingress.scheduler_client import SchedulerClient
        from cluster.ingress.served_model import load_served_model
        from cluster.ingress.token_streams import TokenStreams
        from rpc.client import RpcClient

        self._config = config
        self._model = await asyncio.to_thread(
            load_served_model, Path(config.model.path), config.model.name, config.model.max_model_len
        )
        ingress_id = f"ingress-{secrets.token_hex(6)}"
        client = RpcClient(config.cluster.security)
        self._scheduler_client = SchedulerClient(client, *(partial(address_of, one) for one in schedulers))
        self._streams = TokenStreams(ingress_id, client, config.transfer, config.ingress.max_buffered_tokens)
        fleet = Fleet(
            ingress_id,
            config.block_size,
            config.tenant_salt,
            config.ingress.max_attempts,
            config.ingress.tenants_share_prefixes,
        )
        self._orchestrator = Orchestrator(fleet, config.transfer, client, self._scheduler_client, self._streams)
        self._client = client
        self._scheduler_client.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        from cluster.ingress.app import build_app

        return build_app(self._config.ingress, self._model, self._orchestrator, list_nodes)

    async def __del__(self) -> None:
        """Ends streams and background tasks."""
        await self._streams.close()
        await self._scheduler_client.close()
        await self._client.close()


async def address_of(scheduler: Any) -> str:
    """host:port of the global scheduler's RPC server. Raises PeerLost when Serve has no replica that tells."""
    async with reaching_scheduler():
        return str(await scheduler.address.remote())

"""The HTTP application: routes, authentication, health."""

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter

from cluster.ingress.answer import Edge
from cluster.ingress.chat import chat
from cluster.ingress.completions import complete
from cluster.ingress.connection import read_body
from cluster.ingress.errors import install_error_handlers
from cluster.ingress.fleet_metrics import fleet_exposition
from cluster.ingress.generation import Backend
from cluster.ingress.metrics import Metrics
from cluster.ingress.protocol import ChatRequest, CompletionRequest, GenerationT, TrafficRequest, parse_request
from cluster.ingress.request_scope import RequestRecord, RequestScope
from cluster.ingress.served_model import ServedModel
from core.config import IngressConfig
from core.errors import BatonError, ModelNotFound, RequestNotFound, Unauthorized
from core.messages.to_scheduler import Decisions, FleetStatus, Traffic


def build_app(
    config: IngressConfig, model: ServedModel, backend: Backend, nodes: Callable[[], list[dict[str, object]]] = list
) -> FastAPI:
    """The whole HTTP edge for one model over one backend. Every call has its own metrics.

    `nodes` lists the cluster's machines for `/fleet`; it may block while the cluster's head is away.
    """
    edge = Edge(config, model, backend, Metrics())
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestScope, metrics=edge.metrics)
    install_error_handlers(app)
    app.include_router(_health_routes(edge))
    app.include_router(_api_routes(edge))
    app.include_router(_fleet_routes(edge, nodes))
    return app


def _fleet_routes(edge: Edge, nodes: Callable[[], list[dict[str, object]]]) -> APIRouter:
    routes = APIRouter(dependencies=[_authorized(edge)])

    @routes.get("/fleet")
    async def fleet() -> Response:
        status = TypeAdapter(FleetStatus).dump_python(await edge.backend.fleet(), mode="json")
        return JSONResponse(status | {"nodes": await asyncio.to_thread(nodes)})

    @routes.put("/fleet/traffic")
    async def traffic(http: Request) -> Response:
        wanted = parse_request(TrafficRequest, await read_body(http, edge.config))
        changed = await edge.backend.set_traffic(wanted.weights)
        return JSONResponse(TypeAdapter(Traffic).dump_python(changed, mode="json"))

    return routes


def _api_routes(edge: Edge) -> APIRouter:
    async def parsed(http: Request, kind: type[GenerationT]) -> GenerationT:
        request = parse_request(kind, await read_body(http, edge.config))
        _check_model(edge.model, request.model)
        return request

    routes = APIRouter(prefix="/v1", dependencies=[_authorized(edge)])

    @routes.post("/completions")
    async def completions(http: Request) -> Response:
        return await complete(edge, http, await parsed(http, CompletionRequest))

    @routes.post("/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await chat(edge, http, await parsed(http, ChatRequest))

    @routes.get("/requests/{name}/why")
    async def why(http: Request, name: str) -> Response:
        record: RequestRecord = http.state.record
        found = (await edge.backend.why(name)).decisions
        visible = Decisions(tuple(one for one in found if record.tenant in ("", one.tenant)))
        if not visible.decisions:
            raise RequestNotFound(f"no decision about a request {name!r} is remembered")
        return JSONResponse(TypeAdapter(Decisions).dump_python(visible, mode="json"))

    @routes.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(await edge.served_model())]})

    @routes.get("/models/{name:path}")
    async def model_card(name: str) -> Response:
        _check_model(edge.model, name)
        return JSONResponse(_model_card(await edge.served_model()))

    return routes


def _health_routes(edge: Edge) -> APIRouter:
    routes = APIRouter()

    @routes.get("/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get("/readyz")
    @routes.get("/health")
    async def readyz() -> Response:
        health = await edge.backend.health()
        status = "unavailable" if not health.ready else "degraded" if health.degraded else "ok"
        return JSONResponse({"status": status, "degraded": health.degraded}, 200 if health.ready else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        try:
            fleet = fleet_exposition(await edge.backend.fleet())
        except BatonError as error:
            fleet = f"# no fleet metrics: {error.message}\n".encode()
        return Response(edge.metrics.exposition() + fleet, media_type=CONTENT_TYPE_LATEST)

    return routes


def _authorized(edge: Edge) -> Any:
    async def authorized(http: Request) -> None:
        record: RequestRecord = http.state.record
        record.tenant = _tenant(http, edge.config)

    return Depends(authorized)


def _tenant(http: Request, config: IngressConfig) -> str:
    """Whose key it is; the fleet's own key is nobody's in particular. Raises Unauthorized."""
    keys = config.tenant_keys | ({"": config.api_key} if config.api_key else {})
    if not keys:
        return ""
    scheme, _, given = http.headers.get("authorization", "").partition(" ")
    found = [name for name, key in keys.items() if hmac.compare_digest(given.strip().encode("latin-1"), key.encode())]
    if scheme.lower() != "bearer" or not found:
        raise Unauthorized("Incorrect or missing API key: send it as 'Authorization: Bearer KEY'")
    return found[0]


def _check_model(model: ServedModel, name: str) -> None:
    if name != model.name:
        raise ModelNotFound(f"The model {name!r} does not exist; this server has {model.name!r}", field="model")


def _model_card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "baton",
        "max_model_len": model.max_model_len,
    }

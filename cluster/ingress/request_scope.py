"""What surrounds every HTTP request: its id, its outcome, the last resort for errors. A pure ASGI middleware."""

import asyncio
import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ingress.errors import CLIENT_CLOSED_REQUEST, at_the_edge, error_response
from cluster.ingress.metrics import Metrics, RequestMeter
from core.telemetry import request_id_var

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_ENDPOINTS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/models", "/livez", "/readyz", "/health", "/metrics", "/fleet"}
)


@dataclass
class RequestRecord:
    """One HTTP request. `unique_id` differs even between requests for which a client chose the same id.

    `status` is what the client learned: a stream that failed half-way counts by its error, not as 200.
    """

    request_id: str
    unique_id: str
    meter: RequestMeter
    tenant: str = ""  # by its API key
    status: int = 0
    started: float = field(default_factory=time.perf_counter)


class RequestScope:
    """Middleware: sets the request id, echoes it as X-Request-Id, counts the request when it ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request. `scope["state"]["record"]` holds its RequestRecord."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._record(scope)
        scope.setdefault("state", {})["record"] = record
        token = request_id_var.set(record.request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            record.status = CLIENT_CLOSED_REQUEST  # Serve cancels the task of a request whose client left
            raise
        except Exception as error:
            if record.status:
                raise
            await error_response(at_the_edge(error, 0))(scope, receive, send_with_id)
        finally:
            request_id_var.reset(token)
            self._count(scope["path"], record)

    def _record(self, scope: Scope) -> RequestRecord:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        nonce = secrets.token_hex(12)
        meter = RequestMeter(self._metrics, time.perf_counter())
        if _SAFE_ID.fullmatch(given):
            request_id = given.decode()
            return RequestRecord(request_id, f"{request_id}-{nonce[:12]}", meter)
        return RequestRecord(nonce, nonce, meter)

    def _count(self, path: str, record: RequestRecord) -> None:
        endpoint = path if path in _ENDPOINTS else "other"
        self._metrics.requests.labels(endpoint, str(record.status or 500)).inc()
        self._metrics.request_s.labels(endpoint).observe(time.perf_counter() - record.started)

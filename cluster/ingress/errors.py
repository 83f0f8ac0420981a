"""Errors in OpenAI's shape, and what every exception becomes at the edge."""

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from core.errors import (
    BatonError,
    ModelNotFound,
    Overloaded,
    PeerError,
    PromptTooLong,
    RequestTimeout,
    Unauthorized,
    Unavailable,
)

_log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # only in metrics and logs: nobody is left to read the answer
_CODES: dict[type[BatonError], str] = {
    PromptTooLong: "context_length_exceeded",
    ModelNotFound: "model_not_found",
    Unauthorized: "invalid_api_key",
    Overloaded: "rate_limit_exceeded",
}


class ClientDisconnected(Exception):
    """The client left before its answer was complete."""


def at_the_edge(error: Exception, timeout_s: float) -> BatonError:
    """The error that a client is told about; an unknown one is logged and becomes a plain 500."""
    if isinstance(error, BatonError):
        return error
    if isinstance(error, TimeoutError):
        return RequestTimeout(f"the request took longer than {timeout_s:g} s")
    _log.error("unexpected error", exc_info=error)
    return BatonError("internal error")


def status_of(error: BatonError) -> int:
    """HTTP status; trouble between our own processes is always 503 to a client."""
    return 503 if isinstance(error, PeerError) else error.status


def error_body(error: BatonError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return _body(error.message, error.type, error.field, _CODES.get(type(error)))


def error_response(error: BatonError) -> JSONResponse:
    """The whole HTTP answer to an error, with Retry-After where coming back makes sense."""
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable) and not isinstance(error, RequestTimeout):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 0)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_of(error), headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes every failure of `app` answer in OpenAI's shape."""
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnected, _on_disconnect)


async def _on_baton_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(_body(message, "invalid_request_error", None, None), error.status_code, error.headers)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _body(message: str, kind: str, field: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}

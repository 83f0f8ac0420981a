"""Calls of the command line to a running server."""

from typing import Any

import httpx

from core.errors import InvalidParameter, NoReplica, RequestNotFound, Unauthorized

TIMEOUT_S = 5.0


def ask(method: str, url: str, api_key: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object that a server answers. Raises NoReplica, Unauthorized, InvalidParameter, RequestNotFound."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.request(method, url, headers=headers, json=body, trust_env=False, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise NoReplica(f"no server answers at {url}: {error}") from error
    if answer.status_code == 401:
        raise Unauthorized("the server wants an API key: --api-key or BATON_API_KEY")
    if answer.status_code == 400:
        raise InvalidParameter(answer.json()["error"]["message"])
    if answer.status_code == 404:
        raise RequestNotFound(answer.json().get("error", {}).get("message", f"{url} is not there"))
    if answer.status_code != 200:
        raise NoReplica(f"{url} answers {answer.status_code}: {answer.text[:200]}")
    tree: dict[str, Any] = answer.json()
    return tree

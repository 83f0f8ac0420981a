"""Waits until a deployed application answers."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import httpx

from core.errors import ConfigurationError


def wait_until_ready(
    url: str,
    say: Callable[[str], None],
    timeout_s: float,
    stop: threading.Event | None = None,
    deployed: Future[None] | None = None,
) -> None:
    """Ready: HTTP answers and every configured replica takes work. Raises ConfigurationError with Serve's message.

    The process is connected to Ray. `stop` set or `deployed` failed meanwhile gives up early.
    """
    from ray import serve

    deadline = time.monotonic() + timeout_s
    stop = stop or threading.Event()
    said = ""
    with httpx.Client(trust_env=False, timeout=2) as client:
        while time.monotonic() < deadline:
            apps = serve.status().applications
            for name, app in apps.items():
                if app.status.value in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise ConfigurationError(f"application {name} did not start: {_first_failure(app)}")
            if deployed is not None and deployed.done() and (error := deployed.exception()) is not None:
                raise ConfigurationError(f"the application did not deploy: {error}") from error
            state = _describe(apps)
            if state and state != said:
                say(state)
                said = state
            running = [app.status.value == "RUNNING" for app in apps.values()]
            if len(running) > 1 and all(running) and _answers_ready(client, url):
                return
            if stop.wait(0.1):
                raise ConfigurationError("stopped while starting")
    raise ConfigurationError(f"not ready after {timeout_s:.0f} s: {said}")


def _describe(apps: Mapping[str, Any]) -> str:
    deployments = [item for _, app in sorted(apps.items()) for item in sorted(app.deployments.items())]
    return ", ".join(f"{name} {sum(d.replica_states.values())}x {d.status.value.lower()}" for name, d in deployments)


def _answers_ready(client: httpx.Client, url: str) -> bool:
    try:
        answer = client.get(f"{url}/readyz")
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and not answer.json().get("degraded")


def _first_failure(app: Any) -> str:
    messages = [d.message for d in app.deployments.values() if d.message and d.status.value != "HEALTHY"]
    return str((messages or [app.message])[0])

"""Waits until a deployed application answers, or has answered all."""

import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import httpx

from core.errors import ConfigurationError

STATUS_INTERVAL_S = 0.5  # of questions to Serve's controller, which needs the processor itself while replicas start
_OUR_ERROR = re.compile(r"^\W*core\.errors\.\w+: (.+(?:\n(?=\S).+)*)", re.MULTILINE)


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
    said, asked_at = "", 0.0
    with httpx.Client(trust_env=False, timeout=2) as client:
        while time.monotonic() < deadline:
            if stop.wait(0.1):
                raise ConfigurationError("stopped while starting")
            answer = _readiness(client, url)
            if answer != "" and time.monotonic() - asked_at < STATUS_INTERVAL_S:
                continue
            asked_at = time.monotonic()
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
            if len(running) > 1 and all(running) and (answer == "" or (answer and _is_scaled_to_zero(apps))):
                return
    raise ConfigurationError(f"not ready after {timeout_s:.0f} s: {said}")


def wait_until_idle(url: str, api_key: str, timeout_s: float, hurry: threading.Event) -> None:
    """Until no request is under way, `timeout_s` has passed or `hurry` is set. A server that does not tell is idle."""
    deadline = time.monotonic() + timeout_s
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(trust_env=False, timeout=2, headers=headers) as client:
        while time.monotonic() < deadline and not hurry.wait(0.1):
            try:
                fleet = client.get(f"{url}/fleet").raise_for_status().json()
            except httpx.HTTPError:
                return
            if not fleet["num_waiting"] + fleet["num_reserved"]:
                return


def _describe(apps: Mapping[str, Any]) -> str:
    deployments = [item for _, app in sorted(apps.items()) for item in sorted(app.deployments.items())]
    return ", ".join(f"{name} {sum(d.replica_states.values())}x {d.status.value.lower()}" for name, d in deployments)


def _readiness(client: httpx.Client, url: str) -> str | None:
    """What a fleet that can answer lacks, or "" when it lacks nothing; None when it cannot answer yet."""
    try:
        answer = client.get(f"{url}/readyz")
    except httpx.HTTPError:
        return None
    return str(answer.json().get("degraded", "")) if answer.status_code == 200 else None


def _is_scaled_to_zero(apps: Mapping[str, Any]) -> bool:
    """A pool is empty because its autoscaler wants it so."""
    return any(
        d.status.value == "HEALTHY" and not d.replica_states for a in apps.values() for d in a.deployments.values()
    )


def _first_failure(app: Any) -> str:
    messages = [d.message for d in app.deployments.values() if d.message and d.status.value != "HEALTHY"]
    return sentence_of(str((messages or [app.message])[0]))


def sentence_of(message: str) -> str:
    """What an error of ours says at the end of the traceback that Serve tells; any other message as it is."""
    said = _OUR_ERROR.findall(message)
    return str(said[-1]).strip() if said else message

"""`baton demo`: prompts that share a prefix, each handed off once and prefilled locally once, with a timeline."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.chat import served_model
from cluster.local import local_fleet
from cluster.settings import resolve_config
from core.errors import RequestError

PREFIX = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property "
    "of some one or other of their daughters. "
)
ENDINGS = ("“My dear Mr. Bennet,” said", "It was a dark night, and", "The king then")
MAX_TOKENS = 32


@dataclass
class Run:
    """One request as its client saw it; times in seconds from the request's start."""

    text: str = ""
    token_times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def run_demo(port: int | None, api_key: str, console: Console) -> None:
    """Attaches to a server on `port` (8000), or starts one for the time of the demo."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with (
        _server(port, console) as url,
        httpx.Client(base_url=url, headers=headers, timeout=300, trust_env=False) as client,
    ):
        model = served_model(client)
        for ending in ENDINGS:
            console.rule(f"…{ending}")
            runs = {}
            for placement in ("pair", "local"):
                runs[placement] = run = stream_completion(client, model, PREFIX + ending, placement)
                console.print(f"[bold]{placement}[/bold] {escape(run.text)}")
            same = "the same tokens either way" if runs["pair"].text == runs["local"].text else "the texts DIFFER"
            console.print(f"[dim]sampled with one seed: {same}[/dim]")
            console.print(timeline(runs))
        console.print(
            "On one CPU all replicas share the same cores, so splitting prefill from decode gains nothing here;\n"
            "it pays where the pools have their own hardware. The point of this demo is to show the parts at work."
        )


def stream_completion(client: httpx.Client, model: str, prompt: str, placement: str) -> Run:
    """One streamed completion, sampled with a fixed seed, with its report. Raises RequestError."""
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.8, "seed": 7,
        "stream": True, "ignore_eos": True, "return_token_ids": True, "stream_options": {"include_usage": True},
        "baton": {"placement": placement, "explain": True},
    }  # fmt: skip
    run, started = Run(), time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RequestError(json.loads(answer.read())["error"]["message"])
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestError(event["error"]["message"])
            for choice in event["choices"]:
                run.text += choice["text"]
                run.token_times += [time.perf_counter() - started] * len(choice.get("token_ids") or ())
            run.usage = event.get("usage") or run.usage
            run.report = (event.get("baton") or [run.report])[0]
    return run


def timeline(runs: dict[str, Run]) -> Table:
    """What took the time, side by side."""
    table = Table(show_edge=False)
    table.add_column("")
    for placement, run in runs.items():
        table.add_column(f"{placement} ({run.report['placement']})", justify="right")
    for label, cell in _ROWS.items():
        table.add_row(label, *(cell(run) for run in runs.values()))
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _bandwidth(run: Run) -> str:
    phases = run.report["phases"]
    if not phases["transfer_bytes"]:
        return "-"
    return (
        f"{phases['transfer_bytes'] / 2**10:.0f} KiB, {phases['transfer_bytes'] / phases['fetching_s'] / 1e9:.2f} GB/s"
    )


def _itl(run: Run) -> str:
    gaps = sorted(b - a for a, b in zip(run.token_times, run.token_times[1:], strict=False))
    return _ms(gaps[len(gaps) // 2])


_ROWS: dict[str, Callable[[Run], str]] = {
    "prefilled by": lambda run: run.report["prefill"] or run.report["decode"],
    "decoded by": lambda run: run.report["decode"],
    "queue": lambda run: _ms(run.report["phases"]["queue_s"]),
    "prefill": lambda run: _ms(run.report["phases"]["prefill_s"]),
    "transfer": _bandwidth,
    "  of that after prefill": lambda run: _ms(run.report["phases"]["exposed_transfer_s"]),
    "first token (client)": lambda run: _ms(run.token_times[0]),
    "second token (client)": lambda run: _ms(run.token_times[1]),
    "ITL, median": _itl,
    "prompt tokens cached": lambda run: (
        f"{run.usage['prompt_tokens_details']['cached_tokens']} of {run.usage['prompt_tokens']}"
    ),
    "blocks moved / reused on decode": lambda run: (
        f"{run.report['phases']['num_blocks_received']} / {run.report['phases']['num_blocks_reused']}"
    ),
}


@contextmanager
def _server(port: int | None, console: Console) -> Iterator[str]:
    url = f"http://127.0.0.1:{port or 8000}"
    try:
        if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
            console.print(f"using the server at {url}")
            yield url
            return
    except httpx.HTTPError:
        pass
    with console.status("starting") as status:
        started = local_fleet(resolve_config(None, None, port), status.update, threading.Event())
        with started as fleet:
            status.stop()
            yield fleet.url

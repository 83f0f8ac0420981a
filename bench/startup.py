"""Seconds from launching `baton serve` to ready, and to the first streamed token.

Bound: one process that imports torch and Ray and loads the model, measured in turns with the starts. A fleet needs that
much once; what lies above it is Ray's own start, Serve's controller and proxy, and processes that import the same
libraries again: side by side where there are cores for all, one after another where there are not.
The first start may find files that no one has read since boot; the later ones are the rule.

    python -m bench.startup --starts 3
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from bench.report import ROOT, print_json, print_table
from cluster.chat import served_model
from cluster.local import LOOPBACK, free_port
from cluster.settings import resolve_config
from core.errors import ConfigurationError

SERVE = "from cluster.cli import app; app()"
LOAD = "import sys; from bench.startup import load_bare; load_bare(sys.argv[1], sys.argv[2] or None)"
READY = "ready after"
END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Start:
    """One start, in seconds from its launch; `stop_s` from the signal to the end of the process."""

    ready_s: float
    first_token_s: float
    stop_s: float
    bare_s: float  # importing and loading in one process, right before


def load_bare(checkpoint: str, dtype: str | None) -> None:
    """What no start can do without."""
    import ray.serve  # noqa: F401
    import torch

    from engine.checkpoint import load_model_spec
    from engine.checkpoint_reader import CheckpointReader
    from engine.rank_links import RankLinks
    from engine.runner import ModelRunner

    spec, device = load_model_spec(Path(checkpoint), dtype), torch.device("cpu")
    layout = spec.kv_layout(1, 16)
    read = CheckpointReader(Path(checkpoint), spec, device).read
    runner = ModelRunner(spec, read, layout, 16, RankLinks(), device, 1)
    runner.warm_up()
    runner.close()


def time_bare(checkpoint: str, dtype: str | None) -> float:
    """Seconds of a process that does `load_bare`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD, checkpoint, dtype or ""], cwd=ROOT, check=True)
    return time.perf_counter() - started


def time_start(args: argparse.Namespace, bare_s: float) -> Start:
    """Starts a server, asks it for one token, ends it. Raises ConfigurationError with its output when it fails."""
    port = free_port()
    model = ["--model", str(args.model)] if args.model else []
    config = [str(args.config)] if args.config else []
    command = [sys.executable, "-c", SERVE, "serve", *config, *model, "--port", str(port)]
    started = time.perf_counter()
    with server(command) as process:
        wait_until_ready(process)
        ready_s = time.perf_counter() - started
        wait_for_token(f"http://{LOOPBACK}:{port}")
        first_token_s = time.perf_counter() - started
        stopping = time.perf_counter()
    return Start(ready_s, first_token_s, time.perf_counter() - stopping, bare_s)


@contextmanager
def server(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A server process that is gone in the end."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Reads the server's output up to the line that says so."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if READY in line:
            return
    raise ConfigurationError(f"the server ended: {''.join(said)}")


def wait_for_token(url: str) -> None:
    """Returns when the first piece of a streamed completion is there."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        body = {"model": served_model(client), "prompt": "It is a truth", "max_tokens": 1, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            next(line for line in answer.iter_lines() if line.startswith("data: {"))


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML; without it, the laptop's")
    parser.add_argument("--model", type=Path, help="Hugging Face checkpoint folder; without it, the demo model")
    parser.add_argument("--starts", type=int, default=2)
    args = parser.parse_args()
    config = resolve_config(args.config, args.model)
    starts = [time_start(args, time_bare(config.model.path, config.model.dtype)) for _ in range(args.starts)]
    print_table(
        ("start", "ready s", "first token s", "stop s", "one process s", "ready / one process"),
        [
            (
                str(i + 1),
                f"{start.ready_s:.1f}",
                f"{start.first_token_s:.1f}",
                f"{start.stop_s:.1f}",
                f"{start.bare_s:.1f}",
                f"{start.ready_s / start.bare_s:.1f}",
            )
            for i, start in enumerate(starts)
        ],
    )
    later = starts[1:] or starts
    ratio = statistics.median(start.ready_s / start.bare_s for start in later)
    print_json("startup", args, seed=None, results=[asdict(start) for start in starts], ratio_to_bound=ratio)


if __name__ == "__main__":
    main()

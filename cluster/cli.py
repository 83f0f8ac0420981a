"""The `baton` command."""

import signal
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.local import LocalFleet, local_fleet
from cluster.settings import demo_model_path, resolve_config
from core.config import BatonConfig
from core.errors import BatonError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML configuration; without it, this laptop's CPU")]
ModelDir = Annotated[Path | None, typer.Option(help="Hugging Face checkpoint folder; without it, the demo model")]
Port = Annotated[int | None, typer.Option(help="HTTP port; without it, the configuration's (8000)")]
Url = Annotated[str, typer.Option(help="a running server")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baton {version('baton-llm')}")
        raise typer.Exit


@app.callback()
def baton(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it and end")
    ] = False,
) -> None:
    """LLM serving with prefill and decode disaggregated, on Ray."""


@app.command()
def serve(config: ConfigFile = None, model: ModelDir = None, port: Port = None) -> None:
    """Serve a model on this machine until Ctrl-C."""
    started = time.monotonic()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = resolve_config(config, model, port)
        with console.status("starting") as status, local_fleet(settings, status.update, stop) as fleet:
            status.stop()
            console.print(ready_line(fleet, settings, time.monotonic() - started))
            stop.wait()
            console.print("stopping: replicas finish what they hold")
    except BatonError as error:
        fail(error)


@app.command()
def chat(
    url: Url = "http://127.0.0.1:8000",
    system: Annotated[str, typer.Option(help="a system message")] = "",
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 128,
    api_key: Annotated[str, typer.Option(envvar="BATON_API_KEY", help="when the server wants one")] = "",
) -> None:
    """Talk to a running server; Ctrl-D ends."""
    from cluster.chat import converse

    try:
        converse(url, system, max_tokens, api_key, console)
    except BatonError as error:
        fail(error)


@app.command()
def demo(port: Port = None) -> None:
    """Show handoffs and local prefills side by side, on a running server or on one started for it."""
    from cluster.demo import run_demo

    try:
        run_demo(port, console)
    except BatonError as error:
        fail(error)


@app.command()
def check(
    config: ConfigFile = None,
    model: ModelDir = None,
    memory_gib: Annotated[float | None, typer.Option(help="of a GPU; without it, by accelerator_type")] = None,
    cluster_file: Annotated[Path | None, typer.Option(help="a `ray up` file whose nodes shall hold the pools")] = None,
) -> None:
    """Say what a configuration will allocate on every GPU, and refuse what cannot fit. Starts nothing."""
    from cluster.check.command import run_check

    try:
        run_check(config, model, memory_gib, cluster_file, console)
    except BatonError as error:
        fail(error)


@app.command()
def doctor(
    cluster: Annotated[str, typer.Option(help="address of a Ray cluster, or auto; without it, this host")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Check this host, or every host of a cluster, before it serves; ends with status 1 when a check fails."""
    from cluster.doctor.command import run_doctor

    try:
        is_fit = run_doctor(cluster, as_json, console)
    except BatonError as error:
        fail(error)
    sys.exit(not is_fit)


def ready_line(fleet: LocalFleet, settings: BatonConfig, seconds: float) -> str:
    """The one line that says it all."""
    is_demo = settings.model.path == str(demo_model_path())
    note = " (it shows the machinery and knows nothing)" if is_demo else ""
    return (
        f"ready after {seconds:.1f} s: {fleet.url}/v1, model {settings.model.name}{note}, "
        f"{settings.prefill.min_replicas} prefill + {settings.decode.min_replicas} decode replicas; "
        f"try `baton chat --url {fleet.url}` or `baton demo`; logs in {fleet.log_dir}"
    )


def fail(error: BatonError) -> None:
    """Says what is wrong and ends with status 1."""
    console.print(f"[red]error:[/red] {error.message}")
    sys.exit(1)

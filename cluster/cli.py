"""The `baton` command."""

import signal
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cluster.check.preflight import require_startable
from cluster.local import LocalFleet, local_fleet
from cluster.readiness import wait_until_idle
from cluster.settings import demo_model_path, resolve_config
from core.config import BatonConfig
from core.errors import BatonError
from core.version import VERSION

console = Console(highlight=False)


COMMANDS = "baton.commands"  # entry points of this group are Typer apps of one command, which come in beside the own


class _Commands(TyperGroup):
    """Says what is wrong and ends with status 1 when a command raises an error of the tree."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(entry_points(group=COMMANDS).names)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        found = entry_points(group=COMMANDS, name=cmd_name)
        if not found:
            return None
        command = typer.main.get_command(next(iter(found)).load())
        command.name = cmd_name  # what help lists; a function's name otherwise
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BatonError as error:
            console.print(f"[red]error:[/red] {escape(error.message)}")
            sys.exit(1)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML configuration; without it, this laptop's CPU")]
ModelDir = Annotated[Path | None, typer.Option(help="Hugging Face checkpoint folder; without it, the demo model")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port; without it, the configuration's (8000)")]
Url = Annotated[str, typer.Option(help="a running server")]
ApiKey = Annotated[str, typer.Option(envvar="BATON_API_KEY", help="when the server wants one")]
ClusterYaml = Annotated[Path, typer.Argument(help="cluster file for `ray up`, as in ray_configs/clusters")]
ServeYaml = Annotated[Path, typer.Argument(help="Serve configuration, as in ray_configs/serve")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baton {VERSION}")
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
    stop, hurry = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (hurry if stop.is_set() else stop).set())
    settings = resolve_config(config, model, port)
    require_startable(settings)
    with console.status("starting") as status, local_fleet(settings, status.update, stop) as fleet:
        status.stop()
        console.print(ready_line(fleet, settings, time.monotonic() - started))
        stop.wait()
        patience_s = settings.ingress.drain_timeout_s
        console.print(f"stopping: requests under way get {patience_s:g} s to end; Ctrl-C again ends them")
        wait_until_idle(fleet.url, settings.ingress.api_key, patience_s, hurry)


@app.command()
def chat(
    url: Url = "http://127.0.0.1:8000",
    system: Annotated[str, typer.Option(help="a system message")] = "",
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 128,
    api_key: ApiKey = "",
) -> None:
    """Talk to a running server; Ctrl-D ends."""
    from cluster.chat import converse

    converse(url, system, max_tokens, api_key, console)


@app.command()
def demo(port: Port = None, api_key: ApiKey = "") -> None:
    """Show handoffs and local prefills side by side, on a running server or on one started for it."""
    from cluster.demo import run_demo

    run_demo(port, api_key, console)


@app.command("compile")
def compile_() -> None:
    """Turn what decides into machine code, once per version and host; in one to three minutes."""
    from cluster.compiled import compile_decisions

    with console.status("compiling"):
        folder = compile_decisions()
    console.print(f"schedulers, workers and simulations that start on this host use {folder}")


@app.command()
def up(cluster: ClusterYaml, config: ServeYaml) -> None:
    """Start a cluster's hosts (`ray up`) and deploy to them (`serve deploy`)."""
    from cluster.ray_up import bring_up, read_cluster_file

    bring_up(read_cluster_file(cluster), config, console.print)


@app.command()
def down(
    cluster: ClusterYaml,
    drain_timeout: Annotated[float, typer.Option(help="seconds that replicas get to finish or hand over")] = 60.0,
) -> None:
    """Drain a cluster's fleet and end Ray on all its hosts."""
    from cluster.ray_up import read_cluster_file, take_down

    take_down(read_cluster_file(cluster), drain_timeout, console.print)


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="address, name or id; without it, the node that this runs on")] = "",
    deadline_s: Annotated[float, typer.Option(help="seconds until the node is gone")] = 120.0,
    reason: Annotated[str, typer.Option(help="for Ray's logs")] = "the provider takes the node back",
) -> None:
    """On any node of a cluster: empty one node before it goes; what a spot notice or a maintenance job calls."""
    from cluster.node_drain import drain_node

    drained = drain_node(node, deadline_s, reason)
    console.print(f"{drained} takes nothing new; its replicas are replaced on other nodes, then drain")


@app.command()
def check(
    config: ConfigFile = None,
    model: ModelDir = None,
    memory_gib: Annotated[float | None, typer.Option(help="of a GPU; without it, by accelerator_type")] = None,
    cluster_file: Annotated[Path | None, typer.Option(help="a `ray up` file whose nodes shall hold the pools")] = None,
) -> None:
    """Say what a configuration will allocate on every GPU, and refuse what cannot fit. Starts nothing."""
    from cluster.check.command import run_check

    run_check(config, model, memory_gib, cluster_file, console)


@app.command()
def doctor(
    cluster: Annotated[str, typer.Option(help="address of a Ray cluster, or auto; without it, this host")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Check this host, or every host of a cluster, before it serves; ends with status 1 when a check fails."""
    from cluster.doctor.command import run_doctor

    sys.exit(not run_doctor(cluster, as_json, console))


@app.command()
def deploy(
    config: ServeYaml,
    hosts: Annotated[int, typer.Option(help="wait until so many have joined, so that replicas spread over all")] = 1,
    timeout: Annotated[float, typer.Option(help="seconds until every replica must be ready")] = 1800.0,
) -> None:
    """On a node of a running cluster: deploy, and wait until the fleet answers."""
    from cluster.ray_up import deploy_here

    started = time.monotonic()
    url = deploy_here(config, hosts, console.print, timeout)
    console.print(f"ready after {time.monotonic() - started:.1f} s: {url}/v1; `baton status` shows the fleet")


@app.command()
def status(url: Url = "http://127.0.0.1:8000", api_key: ApiKey = "") -> None:
    """Show nodes, pools, replicas, links, blocks and versions of a running fleet."""
    from cluster.status import fetch_fleet, print_fleet

    print_fleet(fetch_fleet(url, api_key), console)


@app.command()
def why(
    request_id: Annotated[str, typer.Argument(help="id of a request, of its answer, or the X-Request-Id of its call")],
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = "",
) -> None:
    """Show why a request ran where it did: what was weighed, what was foreseen, what came."""
    from cluster.why import fetch_why, print_why

    print_why(fetch_why(url, request_id, api_key), console)


@app.command()
def traffic(
    weights: Annotated[list[str] | None, typer.Argument(help="GENERATION=WEIGHT ..., as in v1=90 v2=10")] = None,
    back: Annotated[bool, typer.Option("--back", help="return to the weights before the last change")] = False,
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = "",
) -> None:
    """Share requests out between the generations of a fleet; without arguments, show how they are."""
    from cluster.status import describe_weights, fetch_fleet, parse_weights, set_traffic

    if weights or back:
        now = set_traffic(url, api_key, None if back else parse_weights(weights or []))
    else:
        now = fetch_fleet(url, api_key)["traffic"]
    no_weights = "no weights: the generation that the front was deployed with gets everything"
    console.print(describe_weights(now["weights"]) if now["weights"] else no_weights)


def ready_line(fleet: LocalFleet, settings: BatonConfig, seconds: float) -> str:
    """The one line that says it all."""
    is_demo = settings.model.path == str(demo_model_path())
    note = " (it shows the machinery and knows nothing)" if is_demo else ""
    return (
        f"ready after {seconds:.1f} s: {fleet.url}/v1, model {settings.model.name}{note}, "
        f"{settings.prefill.min_replicas} prefill + {settings.decode.min_replicas} decode replicas; "
        f"try `baton chat --url {fleet.url}` or `baton demo`; logs in {fleet.log_dir}"
    )

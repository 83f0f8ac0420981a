"""`baton simulate`: plays a recorded trace on a described fleet, with one policy or several, and shows what became."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from core.errors import ConfigurationError
from core.messages.fleet import Role
from simulator.baselines.catalog import POLICIES, find_policy
from simulator.cost.cost_model import CostModel
from simulator.cost.gpus import gpu_cost_model
from simulator.fleet_spec import FleetSpec, load_fleet, with_report_interval
from simulator.page import write_outputs
from simulator.summary import summarize
from simulator.tables import pool_table, summary_table
from simulator.traces.kinds import KINDS
from simulator.traces.readers import read_trace
from simulator.traces.scaling import scale
from simulator.traces.trace import TracedRequest
from simulator.twin import Result, Twin

app = typer.Typer(add_completion=False)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Option(help="a recorded load")],
    fleet: Annotated[Path, typer.Option(help="YAML description of pools, links, scheduler, SLOs and faults")],
    policy: Annotated[list[str] | None, typer.Option(help=f"one or several of {', '.join(POLICIES)}")] = None,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    kind: Annotated[str, typer.Option(help=f"of the trace: {', '.join(KINDS)}")] = "auto",
    rate_scale: Annotated[float, typer.Option(help="so many times the requests in the same time")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="the first so many requests alone")] = None,
    report_interval: Annotated[float | None, typer.Option(help="seconds; coarser is quicker to simulate")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for PNG, HTML and JSON")] = None,
) -> None:
    """Play a trace on a simulated fleet with the production scheduler, pools and policies; needs no GPU."""
    console = Console(highlight=False)
    spec = load_fleet(fleet)
    if report_interval is not None:
        spec = with_report_interval(spec, report_interval)
    requests = load_requests(trace, kind, rate_scale, seed, limit)
    names = list(dict.fromkeys(policy or ["baton"]))
    makers = {name: find_policy(name) for name in names}
    costs = gpu_costs(spec)
    results: dict[str, Result] = {}
    for name in names:
        with console.status(f"{name}: {len(requests)} requests"):
            started = time.perf_counter()
            twin = Twin(spec, costs, seed=seed, make_policy=makers[name])
            with rare_collections():
                results[name] = twin.run(requests)
            seconds = time.perf_counter() - started
        console.print(speed_line(name, results[name], seconds))
    summaries = {name: summarize(result, spec) for name, result in results.items()}
    console.print(summary_table(summaries))
    console.print(pool_table(results))
    if out is not None:
        title = f"{trace.name} x {rate_scale:g} on {fleet.name}"
        console.print(f"written: {write_outputs(out, results, summaries, spec, title)}")


def load_requests(trace: Path, kind: str, rate_scale: float, seed: int, limit: int | None) -> list[TracedRequest]:
    """In order of arrival. Raises ConfigurationError."""
    requests: Sequence[TracedRequest] = read_trace(trace, kind, seed)
    if rate_scale != 1.0:
        try:
            requests = scale(requests, rate_scale, seed)
        except ValueError as error:
            raise ConfigurationError(f"--rate-scale {rate_scale:g}: {error}") from error
    return list(requests[:limit])


def gpu_costs(spec: FleetSpec) -> dict[Role, CostModel]:
    """Of both pools. Raises ConfigurationError for a GPU or model without tables."""
    pools = {role: spec.pool(role) for role in Role}
    return {role: gpu_cost_model(spec.gpu, spec.model, pool.tensor_parallel) for role, pool in pools.items() if pool}


def speed_line(name: str, result: Result, seconds: float) -> str:
    """How fast the simulation went."""
    num_tokens = sum(record.num_prompt_tokens + record.num_output_tokens for record in result.records)
    num = len(result.records)
    return (
        f"{name}: {num} requests, {result.simulated_s:.0f} s simulated in {seconds:.1f} s: "
        f"{num / seconds:.0f} requests/s, {num_tokens / seconds:,.0f} tokens/s, {result.num_events} events"
    )


@contextmanager
def rare_collections() -> Iterator[None]:
    """A run makes millions of objects and hardly a cycle: looking for cycles would take most of its time."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()

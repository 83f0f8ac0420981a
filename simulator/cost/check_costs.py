"""Compares the cost model with measured end-to-end runs, each model with an engine's overhead that others have shown.

    python -m simulator.cost.check_costs TABLES      # a folder with silicon_e2e_*.csv.gz

Two numbers of an engine are fitted to TPOT: for the errors of a model, on the aggregated runs of all other models under
that engine; disaggregated runs are fitted to never. How a benchmark began and what a request takes beside its prompt
differs from one campaign to the next, and no row tells: five numbers for that (campaigns.py) are fitted to the TTFT of
each half of a group's shapes of load, and checked on the other half. Writes engines.json beside this file, of all runs
together.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from simulator.cost.campaigns import held_out_errors
from simulator.cost.fit_engines import as_weights, fit_overhead
from simulator.cost.gpu_cost_model import EngineOverhead
from simulator.cost.measured_runs import MeasuredRun, read_runs
from simulator.cost.models import served_model
from simulator.cost.run_times import AggregatedTimes, DisaggregatedTimes, RunTimes

Errors = list[float]


def main(tables: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Fits, prints errors by engine and model, writes engines.json."""
    left_out: Counter[str] = Counter()
    (path,) = tables.glob("silicon_e2e_*.csv.gz")
    runs = list(read_runs(path, left_out))
    aggregated = [AggregatedTimes(run) for run in runs if run.prefill is None]
    disaggregated = [DisaggregatedTimes(run) for run in runs if run.prefill is not None]
    typer.echo(f"{'engine':11}{'model':17}{'gpu':6}{'weights':11}{'runs':>5}  {'TPOT':^24}  {'TTFT':^24}")
    typer.echo(f"{'':45}{'':>5}  {'bias   median    p90':^24}  {'bias   median    p90':^24}")
    held_out = {
        key: _fit([one for one in aggregated if _fits(one.run, key)]) for key in sorted({_key(run) for run in runs})
    }
    sums: defaultdict[str, tuple[Errors, Errors]] = defaultdict(lambda: ([], []))
    modes: dict[str, Sequence[RunTimes]] = {"aggregated": aggregated, "disaggregated": disaggregated}
    for mode, times in modes.items():
        typer.echo(mode)
        for members in _groups(times):
            weights = as_weights(held_out[_key(members[0].run)])
            tpots = [one.tpot_s(weights) / one.run.tpot_s - 1 for one in members]
            _report(mode, members[0].run, tpots, held_out_errors(members, weights), sums)
    for kind, (tpots, ttfts) in sums.items():
        typer.echo(f"{kind:45}{len(tpots):5}  {_spread(tpots)}  {_spread(ttfts)}")
    for reason, number in left_out.most_common():
        typer.echo(f"left out {number}: {reason}")
    engines = {engine: _fit([one for one in aggregated if one.run.engine == engine]) for engine in _engines(aggregated)}
    Path(__file__).with_name("engines.json").write_text(json.dumps(_described(engines), indent=1) + "\n")


def _key(run: MeasuredRun) -> tuple[str, str]:
    return run.engine, run.model


def _fits(run: MeasuredRun, held_out: tuple[str, str]) -> bool:
    return run.engine == held_out[0] and run.model != held_out[1]


def _engines(times: Sequence[AggregatedTimes]) -> list[str]:
    return sorted({one.run.engine for one in times})


def _groups(times: Sequence[RunTimes]) -> list[list[RunTimes]]:
    groups: defaultdict[tuple[str, str, str, str], list[RunTimes]] = defaultdict(list)
    for one in times:
        groups[one.run.group].append(one)
    return [groups[group] for group in sorted(groups)]


def _fit(times: Sequence[AggregatedTimes]) -> EngineOverhead:
    return fit_overhead([one.run for one in times], [one.loop for one in times])


def _report(
    mode: str, run: MeasuredRun, tpots: Errors, ttfts: Errors, sums: defaultdict[str, tuple[Errors, Errors]]
) -> None:
    kind = "dense models" if served_model(run.model).geometry.experts is None else "mixtures of experts"
    for name in (f"{mode}: {kind}", f"{mode}: all"):
        sums[name][0].extend(tpots)
        sums[name][1].extend(ttfts)
    label = f"{run.engine:11}{run.model:17}{run.gpu:6}{run.precision:11}{len(tpots):5}"
    typer.echo(f"{label}  {_spread(tpots)}  {_spread(ttfts)}")


def _spread(errors: Sequence[float]) -> str:
    if not errors:
        return f"{'':23}"
    median, p90 = np.quantile(np.abs(errors), (0.5, 0.9))
    return f"{np.median(errors):+7.1%} {median:7.1%} {p90:7.1%}"


def _described(overheads: dict[str, EngineOverhead]) -> dict[str, dict[str, float]]:
    return {
        engine: {"step_s": round(found.step_s, 7), "sequence_s": round(found.sequence_s, 8)}
        for engine, found in overheads.items()
    }


if __name__ == "__main__":
    typer.run(main)

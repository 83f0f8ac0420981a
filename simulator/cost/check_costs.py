"""Compares the cost model with measured end-to-end runs, each model with an engine's overhead that others have shown.

    python -m simulator.cost.check_costs TABLES      # a folder with silicon_e2e_*.csv.gz

Two numbers of an engine are fitted to TPOT: for the errors of a model, on the aggregated runs of all other models under
that engine; disaggregated runs are fitted to never. How a benchmark of one host began and what a request takes beside
its prompt differs from one campaign to the next, and no row tells: three numbers for that are fitted to the TTFT of
every second run of a group, and checked on the others. Writes engines.json beside this file, of all runs together.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from simulator.cost.campaigns import Checked, disaggregated_times, fit_campaign, mean_ttft_s, ttft_errors
from simulator.cost.fit_engines import PUBLIC_BURST_SHARE, as_weights, fit_overhead
from simulator.cost.gpu_cost_model import EngineOverhead
from simulator.cost.measured_runs import MeasuredRun, read_runs
from simulator.cost.models import served_model

Errors = list[float]


def main(tables: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Fits, prints errors by engine and model, writes engines.json."""
    left_out: Counter[str] = Counter()
    (path,) = tables.glob("silicon_e2e_*.csv.gz")
    runs = list(read_runs(path, left_out))
    aggregated = [Checked(run) for run in runs if run.prefill is None]
    typer.echo(f"{'engine':11}{'model':17}{'gpu':6}{'weights':11}{'runs':>5}  {'TPOT':^24}  {'TTFT':^24}")
    typer.echo(f"{'':45}{'':>5}  {'bias   median    p90':^24}  {'bias   median    p90':^24}")
    held_out = {key: _fit([c for c in aggregated if _fits(c.run, key)]) for key in sorted({_key(run) for run in runs})}
    sums: defaultdict[str, tuple[Errors, Errors]] = defaultdict(lambda: ([], []))
    typer.echo("aggregated")
    for members in _groups(aggregated):
        overhead = held_out[_key(members[0].run)]
        _report("aggregated", members[0].run, *_aggregated_errors(members, overhead), sums)
    typer.echo("disaggregated")
    for members in _groups([Checked(run) for run in runs if run.prefill is not None]):
        overhead = held_out[_key(members[0].run)]
        _report("disaggregated", members[0].run, *_disaggregated_errors([c.run for c in members], overhead), sums)
    for kind, (tpots, ttfts) in sums.items():
        typer.echo(f"{kind:45}{len(tpots):5}  {_spread(tpots)}  {_spread(ttfts)}")
    for reason, number in left_out.most_common():
        typer.echo(f"left out {number}: {reason}")
    engines = {engine: _fit([c for c in aggregated if c.run.engine == engine]) for engine in _engines(aggregated)}
    Path(__file__).with_name("engines.json").write_text(json.dumps(_described(engines), indent=1) + "\n")


def _key(run: MeasuredRun) -> tuple[str, str]:
    return run.engine, run.model


def _fits(run: MeasuredRun, held_out: tuple[str, str]) -> bool:
    return run.engine == held_out[0] and run.model != held_out[1]


def _engines(checked: Sequence[Checked]) -> list[str]:
    return sorted({c.run.engine for c in checked})


def _groups(checked: Sequence[Checked]) -> list[list[Checked]]:
    groups: defaultdict[tuple[str, str, str, str], list[Checked]] = defaultdict(list)
    for one in checked:
        groups[one.run.group].append(one)
    return [groups[group] for group in sorted(groups)]


def _fit(checked: Sequence[Checked]) -> EngineOverhead:
    return fit_overhead([c.run for c in checked], [c.terms() for c in checked])


def _aggregated_errors(members: Sequence[Checked], overhead: EngineOverhead) -> tuple[Errors, Errors]:
    weights = as_weights(overhead)
    tpots = [float(c.terms().tpot(PUBLIC_BURST_SHARE) @ weights) / c.run.tpot_s - 1 for c in members]
    return tpots, ttft_errors(members[1::2], weights, fit_campaign(members[::2], weights))


def _disaggregated_errors(runs: Sequence[MeasuredRun], overhead: EngineOverhead) -> tuple[Errors, Errors]:
    found = [(run, disaggregated_times(run, overhead)) for run in runs]
    ttfts = [mean_ttft_s(times) / run.ttft_s - 1 for run, times in found]
    return [times.tpot_s / run.tpot_s - 1 for run, times in found], ttfts


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

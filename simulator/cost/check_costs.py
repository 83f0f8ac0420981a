"""Compares the cost model with measured end-to-end runs, after fitting each engine's overhead to one of its models.

    python -m simulator.cost.check_costs TABLES      # a folder with silicon_e2e_*.csv.gz

Three numbers of an engine are fitted to TPOT, on the runs of FITTED alone. How a benchmark began and what a request
takes beside its prompt differs from one campaign to the next, and no row tells: these two numbers are fitted to the
TTFT of every second run of a group, and checked on the others. Writes engines.json beside this file.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from simulator.cost.closed_loop import LoopTerms
from simulator.cost.fit_kernels import not_negative
from simulator.cost.gpu_cost_model import EngineOverhead, GpuCostModel
from simulator.cost.gpu_spec import gpu_spec
from simulator.cost.measured_runs import MeasuredRun, read_runs
from simulator.cost.models import served_model

FITTED = {  # engine -> model and GPU
    "vllm": ("qwen3-32b", "h100", "bfloat16"),
    "vllm-0.14+": ("gpt-oss-120b", "h200", "mxfp4"),
    "trtllm": ("llama-3.1-8b", "h100", "bfloat16"),
    "sglang": ("qwen3-32b", "h100", "bfloat16"),
}
REQUEST_S = (0.0, 0.01, 0.02, 0.04, 0.08, 0.12, 0.16)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Campaign:
    """How a group of runs was measured."""

    burst_share: float  # of a benchmark's requests, those that came at once in its beginning
    request_s: float


def main(tables: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Fits, prints errors by engine and model, writes engines.json."""
    left_out: Counter[str] = Counter()
    (path,) = tables.glob("silicon_e2e_*.csv.gz")
    runs = list(read_runs(path, left_out))
    overheads = {
        engine: fit_overhead([run for run in runs if run.group == (engine, *FITTED[engine])]) for engine in FITTED
    }
    typer.echo(f"{'engine':11}{'model':17}{'gpu':6}{'weights':11}{'runs':>5}  {'TPOT':^24}  {'TTFT':^24}")
    typer.echo(f"{'':45}{'':>5}  {'bias   median    p90':^24}  {'bias   median    p90':^24}")
    groups: defaultdict[tuple[str, str, str, str], list[MeasuredRun]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    tpots: defaultdict[str, list[float]] = defaultdict(list)  # of what was not fitted
    ttfts: defaultdict[str, list[float]] = defaultdict(list)
    for group, members in sorted(groups.items()):
        engine, model, gpu, precision = group
        is_fitted = FITTED[engine] == (model, gpu, precision)
        checked = [(run, _terms(run, overheads[engine])) for run in members]
        tpot_errors = [terms.tpot_s / run.tpot_s - 1 for run, terms in checked]
        ttft_errors = _ttft_errors(checked[1::2], fit_campaign(checked[::2]))
        for kind in (_kind(model), "all"):
            tpots[kind] += [] if is_fitted else tpot_errors
            ttfts[kind] += ttft_errors
        label = f"{engine:11}{model:17}{gpu:6}{precision:11}{len(members):5}"
        typer.echo(f"{label}  {_spread(tpot_errors)}  {_spread(ttft_errors)}  {'TPOT fitted' if is_fitted else ''}")
    for kind, errors in tpots.items():
        typer.echo(f"{f'{kind} that were not fitted':45}{len(errors):5}  {_spread(errors)}  {_spread(ttfts[kind])}")
    for reason, number in left_out.most_common():
        typer.echo(f"left out {number}: {reason}")
    Path(__file__).with_name("engines.json").write_text(json.dumps(_described(overheads), indent=1) + "\n")


def fit_overhead(runs: Sequence[MeasuredRun]) -> EngineOverhead:
    """To the TPOT of runs of one engine."""
    terms = [_terms(run, EngineOverhead()) for run in runs]
    tpots = np.array([run.tpot_s for run in runs])
    columns = [[t.tpot_s for t in terms], [1.0] * len(terms), [float(t.num_clients) for t in terms]]
    share, step_s, sequence_s = _robust(np.array(columns).T / tpots[:, None])
    return EngineOverhead(float(share), float(step_s), float(sequence_s))


def fit_campaign(runs: Sequence[tuple[MeasuredRun, LoopTerms]]) -> Campaign:
    """To the TTFT of runs that were measured alike."""
    campaigns = [Campaign(float(share), request_s) for share in np.linspace(0, 1, 41) for request_s in REQUEST_S]
    return min(campaigns, key=lambda campaign: float(np.median(np.abs(_ttft_errors(runs, campaign)))))


def _ttft_errors(runs: Sequence[tuple[MeasuredRun, LoopTerms]], campaign: Campaign) -> list[float]:
    found = (terms.times(campaign.burst_share, campaign.request_s) for _, terms in runs)
    return [times.ttft_s / run.ttft_s - 1 for times, (run, _) in zip(found, runs, strict=True)]


def _kind(model: str) -> str:
    return "dense models" if served_model(model).geometry.experts is None else "mixtures of experts"


def _robust(relative: Floats) -> Floats:
    """Coefficients whose sum is nearest to 1 in each row, large errors damped."""
    weights, scale = np.ones(len(relative)), relative.max(axis=0)
    for _ in range(9):
        found = not_negative(relative / scale * weights[:, None], weights)
        weights = np.maximum(np.abs(relative / scale @ found - 1), 0.03) ** -0.5
    coefficients: Floats = found / scale
    return coefficients


def _terms(run: MeasuredRun, overhead: EngineOverhead) -> LoopTerms:
    costs = GpuCostModel(
        gpu_spec(run.gpu),
        served_model(run.model),
        run.tensor_parallel,
        run.precision,
        overhead,
        run.expert_parallel,
    )
    return LoopTerms.of(costs, run.num_clients, run.num_prompt_tokens, run.num_output_tokens)


def _spread(errors: Sequence[float]) -> str:
    if not errors:
        return f"{'':23}"
    median, p90 = np.quantile(np.abs(errors), (0.5, 0.9))
    return f"{np.median(errors):+7.1%} {median:7.1%} {p90:7.1%}"


def _described(overheads: dict[str, EngineOverhead]) -> dict[str, dict[str, float]]:
    return {
        engine: {
            "kernel_share": round(found.kernel_share, 4),
            "step_s": round(found.step_s, 7),
            "sequence_s": round(found.sequence_s, 8),
        }
        for engine, found in overheads.items()
    }


if __name__ == "__main__":
    typer.run(main)

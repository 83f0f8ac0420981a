"""Goodput under SLO of the production policy and of published ones, tuned alike, with pools for prefill and without.

Goodput: the highest rate of arrivals at which 90 % (99 %) of all arrivals are inside both SLOs, found by a search of a
fixed number of probes, per GPU. A probe simulates one load for each seed and takes the mean of their shares: on small
fleets a share hangs on which sessions a load drew. Each policy is tuned over equally many configurations with equally
many probes on the first half of a trace, and scored on the second. Bound: nobody serves more than all; the ratio that
is printed is to the best other policy. Cells whose results are in `--out`, of the same seeds, are not run again.

`goodput_loads.py` says how a trace becomes a load of some rate, and where the SLOs are from; `goodput_fleets.py` what
is tuned.

    python -m bench.goodput --traces DIR
    python -m bench.goodput --traces DIR --loads code --gpus 64 --policies baton preble --out results.json
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.goodput_fleets import COLOCATED, NUM_CONFIGS, Shape, configurations, fleet, make_policy
from bench.goodput_loads import LOADS, at_rate, half_windows
from bench.goodput_search import RateSearch, best_of, tune
from bench.report import conditions, print_json, print_table
from simulator.baselines.catalog import POLICIES
from simulator.command import gpu_costs, rare_collections
from simulator.summary import goodput_by_slo
from simulator.traces.readers import read_trace
from simulator.traces.trace import TracedRequest
from simulator.twin import Twin

OURS = "baton"
SHARES = (0.9, 0.99)


@dataclass(frozen=True)
class Cell:
    """What is measured. `colocated` tunes over fleets without prefill pool alone."""

    load: str
    model: str
    num_gpus: int
    policy: str
    colocated: bool

    @property
    def key(self) -> str:
        """In the file of results."""
        where = "colocated" if self.colocated else "any"
        return f"{self.load}/{self.model}/{self.num_gpus}/{self.policy}/{where}"


@dataclass(frozen=True)
class Budget:
    """Probes of each cell, each of as many simulations as there are seeds."""

    tuning: int
    scoring: tuple[int, ...]  # for each of SHARES, each beginning with what those before it know
    seeds: tuple[int, ...]


def main() -> None:
    """Prints a table for each trace and fleet, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of recorded traces")
    parser.add_argument("--loads", choices=sorted(LOADS), nargs="+", default=list(LOADS))
    parser.add_argument("--model", choices=("llama-3.1-8b", "llama-3.1-70b"), default="llama-3.1-8b")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--policies", choices=sorted(POLICIES), nargs="+", default=list(POLICIES))
    parser.add_argument("--colocated", action="store_true", help="tune over fleets without a prefill pool alone")
    parser.add_argument("--tuning", type=int, default=NUM_CONFIGS + 2, help="probes of each cell")
    parser.add_argument("--scoring", type=int, nargs=len(SHARES), default=[5, 2], help="the same, at 90 and at 99 %%")
    parser.add_argument("--out", type=Path, default=Path("bench/results/goodput.json"), help="is added to")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each probe's loads")
    args = parser.parse_args()
    cells = [
        Cell(load, args.model, args.gpus, policy, args.colocated) for load in args.loads for policy in args.policies
    ]
    budget = Budget(args.tuning, tuple(args.scoring), tuple(args.seeds))
    begun = conditions()  # of the code that was loaded, whatever the tree becomes meanwhile
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    missing = [cell for cell in cells if found.get(cell.key, {}).get("seeds") != args.seeds]
    for cell, result in _measured(missing, args.traces, budget, args.jobs):
        found[cell.key] = begun | {"seeds": args.seeds, **result}
        args.out.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    for load in args.loads:
        print(f"\n{load}, {args.model}, {args.gpus} H100{', colocated' if args.colocated else ''}")
        rows = {cell.policy: found[cell.key] for cell in cells if cell.load == load}
        print_table(("policy", "at 90 %", "at 99 %", "tuned to", "ours/it"), table_rows(rows))
    print_json("goodput", args, cells={cell.key: found[cell.key]["goodput"] for cell in cells})


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The best first; goodput in requests per second and GPU."""
    ours = results.get(OURS, {"goodput": [0.0]})["goodput"][0]
    ordered = sorted(results.items(), key=lambda item: -item[1]["goodput"][0])
    return [
        (
            policy,
            *(f"{goodput:.3f}" for goodput in one["goodput"]),
            one["tuned"],
            f"{ours / one['goodput'][0]:.2f}" if one["goodput"][0] else "-",
        )
        for policy, one in ordered
    ]


def _measured(
    cells: Sequence[Cell], traces: Path, budget: Budget, num_jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if num_jobs == 1:
        yield from ((cell, measure(cell, traces, budget)) for cell in cells)
        return
    with ProcessPoolExecutor(num_jobs) as executor:
        futures = {executor.submit(measure, cell, traces, budget): cell for cell in cells}
        yield from ((futures[done], done.result()) for done in as_completed(futures))


def measure(cell: Cell, traces: Path, budget: Budget) -> dict[str, Any]:
    """Tunes on the first half, scores on the second."""
    halves = [_halves(traces, cell.load, cell.model, seed) for seed in budget.seeds]

    def mean_share(half: int, shape: Shape, rate: float) -> float:
        loads = zip(budget.seeds, halves, strict=True)
        return fmean(good_share(cell, shape, of_seed[half], rate, seed) for seed, of_seed in loads)

    guess = LOADS[cell.load].guess_per_gpu[cell.model] * cell.num_gpus
    shapes = list(COLOCATED) if cell.colocated else configurations(cell.policy)
    trials = tune(
        len(shapes),
        lambda number, rate: mean_share(0, shapes[number], rate),
        guess,
        SHARES[0],
        budget.tuning,
    )
    shape = shapes[best_of(trials, SHARES[0])]
    search = RateSearch(partial(mean_share, 1, shape))
    for share, num_probes in zip(SHARES, budget.scoring, strict=True):
        search.highest(share, guess, num_probes)
    rates = [search.highest(share, guess, 0) for share in SHARES]  # later probes tell of the laxer share, too
    return {
        "goodput": [round(rate / cell.num_gpus, 4) for rate in rates],
        "tuned": str(shape),
        "trials": [[str(shapes[trial.number]), *asdict(trial.probe).values()] for trial in trials],
        "probes": [[*asdict(probe).values()] for probe in search.probes],
    }


def good_share(cell: Cell, shape: Shape, window: Sequence[TracedRequest], rate: float, seed: int) -> float:
    """Of all arrivals; who got no whole answer is not good. One simulation."""
    load = LOADS[cell.load]
    slo = load.slos[cell.model]
    spec = fleet(cell.model, cell.num_gpus, shape, slo)
    requests = at_rate(window, load.window_s, rate, seed)
    twin = Twin(spec, gpu_costs(spec), seed=seed, make_policy=make_policy(cell.policy, shape))
    with rare_collections():
        result = twin.run(requests)
    assert len(result.records) == len(requests)
    return goodput_by_slo(result.records, [(slo.ttft_s, slo.tpot_s)])[0]


@cache
def _halves(traces: Path, name: str, model: str, seed: int) -> tuple[list[TracedRequest], list[TracedRequest]]:
    load = LOADS[name]
    max_model_len = fleet(model, 8, COLOCATED[0], load.slos[model]).max_model_len
    return half_windows(read_trace(traces / load.file, seed=seed), load, max_model_len, seed)


if __name__ == "__main__":
    main()

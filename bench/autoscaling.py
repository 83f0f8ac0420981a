"""What following the load saves and costs: the production autoscaling on a plant in place of a fleet.

Bound below: the work itself. Prompt tokens at a prefill replica's rate, and output tokens at the pace of full decode
batches, take so many replica-seconds whatever the policy; `of work` is what was asked for, over that. Bound on the SLO:
the start of a replica. What comes between a rise of the load and `--start-s` later meets the capacity of before; no
policy without foresight serves it in time.

The plant (bench/fleet_plant.py) has queue, rates, batches and start delays of the order of an 8B model on H100s. It
knows no transfers, failures or prefix hits. Beside it stand static fleets of the autoscaler's peak and mean sizes.

    python -m bench.autoscaling
    python -m bench.autoscaling --trace TRACE.csv.gz --rates RATES.csv --plot timeline.png
"""

import argparse
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import fmean

from bench.arrivals import Arrival, read_rates, read_trace, rise_and_fall
from bench.fleet_plant import FleetPlant, PlantSpec
from bench.report import print_json, print_table
from bench.timeline import Point, plot_timeline
from cluster.autoscaling.autoscaling import Autoscaling
from cluster.autoscaling.forecast import make_forecaster
from core.autoscaling_config import ForecastConfig
from core.config import BatonConfig, parse_config
from core.errors import ConfigurationError
from core.messages.fleet import Role

STEP_S = 0.5
DRAIN_S = 600.0  # after the last arrival, at most
START = datetime(2026, 11, 18, 8, tzinfo=UTC)


@dataclass(frozen=True)
class Outcome:
    """One fleet under one load."""

    name: str
    replica_s: float
    share_in_slo: float  # of all arrivals, those with their first token in time
    p99_ttft_s: float
    num_changes: int
    peak: tuple[int, int]
    timeline: list[Point]


def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="recorded requests instead of the load that rises and falls")
    parser.add_argument("--rates", type=Path, help="requests/s over days: tells how far forecasts miss them")
    parser.add_argument("--factor", type=float, default=5.0, help="of the rise")
    parser.add_argument("--rate", type=float, default=4.0, help="requests/s before and after the rise")
    parser.add_argument("--phase-s", type=float, default=900.0, help="length of each of the three phases")
    parser.add_argument("--start-s", type=float, default=60.0, help="until a new replica is ready")
    parser.add_argument("--ttft-target-s", type=float, default=2.0)
    parser.add_argument("--downscale-delay-s", type=float, default=300.0)
    parser.add_argument("--max-gpus", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG of sizes and TTFT over time")
    args = parser.parse_args()
    load = (
        read_trace(args.trace) if args.trace else rise_and_fall(args.rate, args.factor, args.phase_s, args.seed)
    )  # fmt: skip
    spec = PlantSpec(start_s=args.start_s)
    config = configuration(args)
    followed = play("autoscaled", load, spec, config, (1, 1))
    mean_size = (
        ceil(fmean(point.prefill_target for point in followed.timeline)),
        ceil(fmean(point.decode_target for point in followed.timeline)),
    )
    fixed = config.model_copy(update={"autoscaling": config.autoscaling.model_copy(update={"policy": "fixed"})})
    outcomes = [followed] + [
        play(f"static {name}", load, spec, keep_at(fixed, size), size)
        for name, size in (("peak", followed.peak), ("mean", mean_size))
    ]
    work_s = least_replica_s(load, spec)
    peak_s = outcomes[1].replica_s
    print_table(
        ("fleet", "P max", "D max", "replica-s", "of peak", "of work", "in SLO", "TTFT p99 s", "changes"),
        [
            (
                o.name, str(o.peak[0]), str(o.peak[1]), f"{o.replica_s:.0f}", f"{o.replica_s / peak_s:.2f}",
                f"{o.replica_s / work_s:.2f}", f"{o.share_in_slo:.1%}", f"{o.p99_ttft_s:.2f}", str(o.num_changes),
            )
            for o in outcomes
        ],
    )  # fmt: skip
    misses = forecast_misses(args.rates) if args.rates else {}
    if misses:
        print_table(("an hour ahead", "mean miss"), [(name, f"{miss:.1%}") for name, miss in misses.items()])
    if args.plot:
        plot_timeline(followed.timeline, "predicted TTFT, s", args.plot)
    print_json(
        "autoscaling",
        args,
        num_requests=len(load),
        least_replica_s=round(work_s),
        fleets={o.name: summary(o, peak_s, work_s) for o in outcomes},
        forecast_miss={name: round(miss, 3) for name, miss in misses.items()},
    )


def configuration(args: argparse.Namespace) -> BatonConfig:
    """The slo policy with room to grow."""
    pool = {"min_replicas": 1, "max_replicas": 200}
    section = {
        "policy": "slo", "ttft_target_s": args.ttft_target_s, "itl_target_s": 0.04, "replica_start_s": args.start_s,
        "downscale_delay_s": args.downscale_delay_s, "max_gpus": args.max_gpus,
    }  # fmt: skip
    return parse_config({"prefill": pool, "decode": pool, "autoscaling": section})


def keep_at(config: BatonConfig, size: tuple[int, int]) -> BatonConfig:
    """The same with pools of one size."""
    prefill, decode = (
        pool.model_copy(update={"min_replicas": num, "max_replicas": num})
        for pool, num in zip((config.prefill, config.decode), size, strict=True)
    )
    return config.model_copy(update={"prefill": prefill, "decode": decode})


def play(name: str, load: list[Arrival], spec: PlantSpec, config: BatonConfig, size: tuple[int, int]) -> Outcome:
    """Runs the load to its end and until all is answered, at most `DRAIN_S` longer."""
    section, autoscaling = config.autoscaling, Autoscaling.of(config)
    plant = FleetPlant(spec, {Role.PREFILL: size[0], Role.DECODE: size[1]}, section.rate_window_s, START)
    timeline: list[Point] = []
    num_arrived, next_tick, num_changes = 0, 0.0, 0
    end = load[-1].at_s
    while plant.now <= end or (plant.num_unfinished and plant.now < end + DRAIN_S):
        while num_arrived < len(load) and load[num_arrived].at_s <= plant.now:
            plant.arrive(load[num_arrived].num_prompt, load[num_arrived].num_output)
            num_arrived += 1
        plant.advance(STEP_S)
        if plant.now >= next_tick:
            next_tick += section.interval_s
            signals = plant.signals()
            targets = autoscaling.decide(signals)
            for role in Role:
                num_changes += targets.of(role).num_replicas != signals.of(role).num_target
                plant.resize(role, targets.of(role).num_replicas)
            p, d = targets.prefill.num_replicas, targets.decode.num_replicas
            ready = signals.prefill.num_ready, signals.decode.num_ready
            timeline.append(Point(plant.now, ready[0], p, ready[1], d, signals.predicted_ttft_s))
    ttfts = sorted(request.ttft_s if request.first_token_at > 0 else float("inf") for request in plant.requests)
    return Outcome(
        name,
        plant.replica_s,
        sum(ttft_s <= section.ttft_target_s for ttft_s in ttfts) / len(ttfts),
        ttfts[ceil(0.99 * len(ttfts)) - 1],
        num_changes,
        (max(point.prefill_target for point in timeline), max(point.decode_target for point in timeline)),
        timeline,
    )


def least_replica_s(load: list[Arrival], spec: PlantSpec) -> float:
    """Every replica busy all the time, decode with full batches."""
    prefill_s = sum(arrival.num_prompt for arrival in load) / spec.prefill_tokens_per_s
    step_s = spec.itl_base_s + spec.itl_per_request_s * spec.max_num_seqs
    return prefill_s + sum(arrival.num_output for arrival in load) * step_s / spec.max_num_seqs


def summary(outcome: Outcome, peak_s: float, work_s: float) -> dict[str, float | int | list[int]]:
    """For the JSON line."""
    return {
        "replica_s": round(outcome.replica_s),
        "of_static_peak": round(outcome.replica_s / peak_s, 3),
        "ratio_to_limit": round(outcome.replica_s / work_s, 2),
        "share_in_slo": round(outcome.share_in_slo, 4),
        "p99_ttft_s": round(outcome.p99_ttft_s, 2),
        "num_changes": outcome.num_changes,
        "peak": list(outcome.peak),
    }


def forecast_misses(path: Path) -> dict[str, float]:
    """Mean absolute miss an hour ahead, relative to the mean rate, from the fourth day on; "as now" is no forecast."""
    rates = read_rates(path)
    actual = dict(rates)
    forecasters = {"seasonal_naive": make_forecaster(ForecastConfig(kind="seasonal_naive"))}
    try:
        forecasters["holt_winters"] = make_forecaster(ForecastConfig(kind="holt_winters"))
    except ConfigurationError as error:
        print(error)
    missed: dict[str, list[float]] = {"as now": [], **{name: [] for name in forecasters}}
    for at, rate in rates:
        for forecaster in forecasters.values():
            assert forecaster is not None, "both kinds exist"
            forecaster.observe(at, rate)
        if at < 4 * 86400 or at + 3600 not in actual:
            continue
        missed["as now"].append(abs(rate - actual[at + 3600]))
        for name, forecaster in forecasters.items():
            assert forecaster is not None, "both kinds exist"
            ahead = forecaster.forecast(at + 3600)
            assert ahead is not None, "three days were seen"
            missed[name].append(abs(ahead - actual[at + 3600]))
    mean_rate = sum(actual.values()) / len(actual)
    return {name: sum(errors) / len(errors) / mean_rate for name, errors in missed.items()}


if __name__ == "__main__":
    main()

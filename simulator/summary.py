"""A run in few numbers: latencies, goodput of all arrivals, cache hits, bytes moved, GPUs used. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

from core.messages.fleet import Role
from core.messages.to_scheduler import Foresight
from simulator.fleet_spec import FleetSpec
from simulator.records import Record
from simulator.twin import Result

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Percentiles:
    """Seconds that half, 90 % and 99 % do not exceed."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """`*_of_all` count every arrival, with infinity for those without a whole answer; the others those with one."""

    num_arrived: int
    num_completed: int
    outcomes: Mapping[str, int]
    reasons: Mapping[str, int]  # why requests ran where they did
    simulated_s: float
    ttft: Percentiles
    tpot: Percentiles  # of requests: the mean time of each token after the first
    itl: Percentiles  # of tokens
    queued: Percentiles  # at the scheduler
    ttft_of_all: Percentiles
    tpot_of_all: Percentiles
    good_share: float  # of all arrivals, within both SLOs
    good_per_s: float
    good_per_gpu_s: float
    goodput_at_90_per_s: float  # arrivals per second if at least 90 % of them were good, else 0
    goodput_at_99_per_s: float
    hit_rate: float  # share of the prompt tokens of completed requests
    transfer_gib: float
    gpu_hours: float
    num_resumed: int  # requests that needed more than one attempt
    num_reports: int
    report_interval_s: float
    num_planned_alone: int
    foresight: Foresight | None  # of policies that predict


def summarize(result: Result, spec: FleetSpec) -> Summary:
    """Of a run with at least one arrival."""
    records = result.records
    done = [record for record in records if record.is_completed]
    good = sum(record.meets(spec.slo.ttft_s, spec.slo.tpot_s) for record in records)
    span_s = max(record.arrived_s for record in records) or result.simulated_s
    rate, share = len(records) / span_s, good / len(records)
    gpu_s = _gpu_seconds(result, spec)
    num_prompt = sum(record.num_prompt_tokens for record in done)
    return Summary(
        len(records),
        len(done),
        dict(Counter(record.outcome for record in records).most_common()),
        dict(Counter(record.reason for record in records if record.reason).most_common()),
        result.simulated_s,
        percentiles([record.ttft_s for record in done]),
        percentiles([record.tpot_s for record in done]),
        Percentiles(*result.gaps.percentiles(SHARES)),
        percentiles([record.queued_s for record in done]),
        percentiles([record.ttft_s if record.is_completed else inf for record in records]),
        percentiles([record.tpot_s if record.is_completed else inf for record in records]),
        share,
        good / span_s,
        good / gpu_s if gpu_s else 0.0,
        rate if share >= 0.9 else 0.0,
        rate if share >= 0.99 else 0.0,
        sum(record.num_cached_tokens for record in done) / num_prompt if num_prompt else 0.0,
        result.num_transfer_bytes / 2**30,
        gpu_s / 3600,
        sum(record.num_attempts > 1 for record in records),
        result.num_reports,
        spec.report.interval_s,
        result.num_planned_alone,
        result.foresight,
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """By nearest rank; zeros where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return Percentiles(0.0, 0.0, 0.0)
    return Percentiles(*(ordered[max(0, ceil(share * len(ordered)) - 1)] for share in SHARES))


def goodput_by_slo(records: Sequence[Record], slos: Sequence[tuple[float, float]]) -> list[float]:
    """The share of all arrivals within each (TTFT, TPOT)."""
    return [sum(record.meets(*slo) for record in records) / len(records) for slo in slos]


def _gpu_seconds(result: Result, spec: FleetSpec) -> float:
    total = 0.0
    for role in Role:
        pool, before_s = spec.pool(role), 0.0
        for point in result.sampler.pools[role]:
            total += point.num_replicas * (point.time_s - before_s) * (pool.tensor_parallel if pool else 0)
            before_s = point.time_s
    return total

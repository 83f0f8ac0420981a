"""Summaries of runs side by side, for people."""

from collections.abc import Mapping

from rich.table import Table

from core.messages.fleet import Role
from simulator.summary import Percentiles, Summary
from simulator.twin import Result


def summary_table(summaries: Mapping[str, Summary]) -> Table:
    """One column for each policy."""
    table = Table(title="requests", title_justify="left")
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    columns = [_cells(summary) for summary in summaries.values()]
    for row, label in enumerate(columns[0]):
        table.add_row(label, *(list(column.values())[row] for column in columns))
    return table


def pool_table(results: Mapping[str, Result]) -> Table:
    """Means over time of each pool."""
    table = Table(title="pools, means over time", title_justify="left")
    for label in ("policy", "pool", "replicas", "utilisation", "waiting", "running", "KV usage", "hit rate"):
        table.add_column(label, justify="left" if label in ("policy", "pool") else "right")
    for name, result in results.items():
        for role in Role:
            points = result.sampler.pools[role]
            if not any(point.num_replicas for point in points):
                continue
            means = [
                sum(values) / len(points)
                for values in zip(
                    *(
                        (p.num_replicas, p.utilization, p.num_waiting, p.num_running, p.kv_usage, p.hit_rate)
                        for p in points
                    ),
                    strict=True,
                )
            ]
            replicas, busy, waiting, running, usage, hits = means
            shares = f"{busy:.0%}", f"{waiting:.1f}", f"{running:.1f}", f"{usage:.0%}", f"{hits:.0%}"
            table.add_row(name, role.value, f"{replicas:.1f}", *shares)
    return table


def _cells(summary: Summary) -> dict[str, str]:
    outcomes = ", ".join(f"{num} {name}" for name, num in summary.outcomes.items())
    return {
        "arrived": f"{summary.num_arrived}",
        "outcomes": outcomes,
        "placed": ", ".join(f"{num} {name}" for name, num in summary.reasons.items()),
        "TTFT p50 / p90 / p99": _seconds(summary.ttft),
        "  of all arrivals": _seconds(summary.ttft_of_all),
        "TPOT p50 / p90 / p99": _seconds(summary.tpot),
        "ITL p50 / p90 / p99": _seconds(summary.itl),
        "queued p50 / p90 / p99": _seconds(summary.queued),
        "within both SLOs": f"{summary.good_share:.2%} of all arrivals, {summary.good_per_s:.3f}/s",
        "goodput at 90 % / 99 %": f"{summary.goodput_at_90_per_s:.3f} / {summary.goodput_at_99_per_s:.3f} per s",
        "good per GPU second": f"{summary.good_per_gpu_s:.4f}",
        "cache hit rate": f"{summary.hit_rate:.1%}",
        "KV moved": f"{summary.transfer_gib:.1f} GiB",
        "resumed": f"{summary.num_resumed}",
        "GPU hours": f"{summary.gpu_hours:.2f}",
        "predictions off, p50 / p95": _foresight(summary),
        "reports": f"{summary.num_reports}, every {summary.report_interval_s:g} s",
    }


def _foresight(summary: Summary) -> str:
    if summary.foresight is None:
        return "-"
    errors = summary.foresight.errors
    return ", ".join(f"{one.quantity.upper()} {one.median:.0%} / {one.p95:.0%}" for one in errors) or "-"


def _seconds(of: Percentiles) -> str:
    return " / ".join(_milliseconds(value) for value in (of.p50, of.p90, of.p99))


def _milliseconds(seconds: float) -> str:
    if seconds == float("inf"):
        return "never"
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.1f} ms"

"""Pictures of runs: latencies, goodput, hit rate, utilisation and queues over time, and latencies as distributions."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from core.errors import ConfigurationError
from core.messages.fleet import Role
from simulator.fleet_spec import FleetSpec
from simulator.series import FleetPoint, PoolPoint
from simulator.twin import Result


def draw(results: Mapping[str, Result], spec: FleetSpec) -> dict[str, bytes]:
    """PNGs by name: the timeline of all runs, and their distributions. Raises ConfigurationError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigurationError("pictures need matplotlib: pip install 'baton-llm[simulate]'") from error
    matplotlib.use("Agg")
    return {"timeline": _timeline(results, spec), "distributions": _distributions(results, spec)}


def _timeline(results: Mapping[str, Result], spec: FleetSpec) -> bytes:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 2, figsize=(13, 13), sharex=True)
    for name, result in results.items():
        fleet = result.sampler.fleet
        _line(axes[0][0], fleet, lambda point: point.mean_ttft_s, name)
        _line(axes[0][1], fleet, lambda point: point.mean_tpot_s * 1e3, name)
        _line(axes[1][0], fleet, lambda point: point.good_per_s, name)
        _line(axes[1][1], fleet, lambda point: float(point.num_queued), name)
        for role, style in ((Role.PREFILL, "-"), (Role.DECODE, "--")):
            points = result.sampler.pools[role]
            if not any(point.num_replicas for point in points):
                continue
            label = f"{name} {role.value}"
            _line(axes[2][0], points, lambda point: point.utilization, label, style)
            _line(axes[2][1], points, lambda point: point.hit_rate, label, style)
            _line(axes[3][0], points, lambda point: float(point.num_running), label, style)
            _line(axes[3][1], points, lambda point: point.kv_usage, label, style)
    first = next(iter(results.values())).sampler.fleet
    axes[1][0].plot([p.time_s for p in first], [p.arrivals_per_s for p in first], ":", color="grey", label="arrivals")
    axes[0][0].axhline(spec.slo.ttft_s, color="grey", linestyle=":")
    axes[0][1].axhline(spec.slo.tpot_s * 1e3, color="grey", linestyle=":")
    titles = ["mean TTFT, s", "mean TPOT, ms", "good requests per second", "queue at the scheduler"]
    titles += ["utilisation", "hit rate of prompt tokens", "running requests", "KV usage"]
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[3]:
        axis.set_xlabel("seconds since the trace began")
    return _png(figure)


def _distributions(results: Mapping[str, Result], spec: FleetSpec) -> bytes:
    """Of all arrivals: curves that end below 1 tell of those without a whole answer."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    for name, result in results.items():
        done = [record for record in result.records if record.is_completed]
        shares = [(number + 1) / len(result.records) for number in range(len(done))]
        axes[0].plot(sorted(record.ttft_s for record in done), shares, label=name)
        axes[1].plot(sorted(record.tpot_s * 1e3 for record in done), shares, label=name)
    for axis, title, slo in ((axes[0], "TTFT, s", spec.slo.ttft_s), (axes[1], "TPOT, ms", spec.slo.tpot_s * 1e3)):
        axis.axvline(slo, color="grey", linestyle=":")
        axis.set_title(title + ": share of all arrivals", loc="left", fontsize=10)
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _png(figure)


def _line(
    axis: Any,
    points: Sequence[FleetPoint] | Sequence[PoolPoint],
    value: Callable[[Any], float],
    label: str,
    style: str = "-",
) -> None:
    axis.plot([point.time_s for point in points], [value(point) for point in points], style, label=label, linewidth=1)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    figure.tight_layout()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()

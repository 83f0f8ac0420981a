"""Pool sizes and waiting times as a picture: of the model of a fleet, and of fleets that tests run on hosts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """Both pools at one moment."""

    at_s: float
    prefill_ready: int
    prefill_target: int
    decode_ready: int
    decode_target: int
    load: float  # what the lower half shows, in its own unit


def plot_timeline(points: Sequence[Point], load_label: str, path: Path) -> None:
    """Writes a PNG: sizes above, load below."""
    at = [point.at_s for point in points]
    figure = Figure(figsize=(10, 6), layout="constrained")
    sizes, loads = figure.subplots(2, 1, sharex=True)
    for name, ready, target, colour in (
        ("prefill", [p.prefill_ready for p in points], [p.prefill_target for p in points], "tab:blue"),
        ("decode", [p.decode_ready for p in points], [p.decode_target for p in points], "tab:orange"),
    ):
        sizes.step(at, ready, where="post", color=colour, label=f"{name} ready")
        sizes.step(at, target, where="post", color=colour, linestyle=":", label=f"{name} target")
    sizes.set_ylabel("replicas")
    sizes.yaxis.get_major_locator().set_params(integer=True)
    sizes.legend()
    loads.plot(at, [point.load for point in points], color="tab:red")
    loads.set_ylabel(load_label)
    loads.set_xlabel("s")
    figure.savefig(path)

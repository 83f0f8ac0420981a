"""How a benchmark tells what it found: a small table, then one JSON line that says under which conditions."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from core.compiled import found_build

ROOT = Path(__file__).parents[1]


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Right-aligned columns but for the first."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in _cells(row, widths)
        )
        print("  ".join((first, *others)).rstrip())


def print_json(name: str, args: argparse.Namespace, **found: Any) -> None:
    """The closing line: benchmark, conditions, every option, and what was found."""
    config = {option: str(value) if isinstance(value, Path) else value for option, value in vars(args).items()}
    print(json.dumps({"benchmark": name} | conditions() | {"config": config} | found), flush=True)


def conditions() -> dict[str, Any]:
    """When, where and of what; the load average tells whether the machine was shared."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} x {_cpu_name()}",
        "load_average": round(os.getloadavg()[0], 1),
        "compiled": found_build() is not None,  # what decides; see cluster.compiled
    }


def milliseconds(seconds: float) -> str:
    """For tables."""
    return f"{seconds * 1e3:.1f}"


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(row, widths, strict=True)))


def _commit() -> str:
    """Short hash, with a + when the tree differs from it; empty outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

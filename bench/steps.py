"""Runs benchmarks and tests each in a process of its own, showing what they print and keeping their JSON lines."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import ROOT


@dataclass(frozen=True)
class Step:
    """A finished process. `found` is the JSON object of its last line, if that is one."""

    name: str
    status: int
    seconds: float
    output: str  # standard output and error, as shown
    found: dict[str, Any] | None


def run_step(name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Step:
    """`python -m` with these arguments; its JSON line is kept and not shown."""
    print(f"\n== {name}: python -m {' '.join(arguments)}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}) | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines, found = list[str](), None
    for line in process.stdout:
        if line.startswith("{"):
            found = json_object(line)
        if found is None or not line.startswith("{"):
            lines.append(line)
            print(line, end="", flush=True)
    return Step(name, process.wait(), round(time.perf_counter() - started, 1), "".join(lines), found)


def json_object(line: str) -> dict[str, Any] | None:
    """What a line says, None when it is no JSON object."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def summary(steps: Sequence[Step]) -> dict[str, Any]:
    """What all steps found, by name; a failed one tells its exit status."""
    return {
        step.name: {"seconds": step.seconds, "status": step.status} | ({"found": step.found} if step.found else {})
        for step in steps
    }

"""Requests over time: a load that rises and falls, or a recorded trace."""

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

TIME_COLUMNS = ("t_s", "TIMESTAMP", "timestamp")
INPUT_COLUMNS = ("input_tokens", "ContextTokens", "input_length")
OUTPUT_COLUMNS = ("output_tokens", "GeneratedTokens", "output_length")


@dataclass(frozen=True)
class Arrival:
    """One request: seconds from the start, tokens in and out."""

    at_s: float
    num_prompt: int
    num_output: int


def rise_and_fall(low_per_s: float, factor: float, phase_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals for three phases: low, `factor` times that, low. About 1500 tokens in and 200 out."""
    draw, at_s = random.Random(seed), 0.0
    arrivals: list[Arrival] = []
    while True:
        high = phase_s <= at_s < 2 * phase_s
        at_s += draw.expovariate(low_per_s * (factor if high else 1.0))
        if at_s >= 3 * phase_s:
            return arrivals
        arrivals.append(Arrival(at_s, round(draw.uniform(500, 2500)), round(draw.uniform(50, 350))))


def read_trace(path: Path) -> list[Arrival]:
    """A CSV or JSONL file, gzipped or not, with one of the column names above each; sorted, from 0 on.

    Raises ValueError naming the file when a column is missing.
    """
    rows = [(_seconds(row, path), row) for row in _rows(path)]
    begin = min(at for at, _ in rows)
    found = [
        Arrival(at - begin, max(1, int(_column(row, INPUT_COLUMNS, path))), int(_column(row, OUTPUT_COLUMNS, path)))
        for at, row in rows
    ]
    return sorted(found, key=lambda arrival: arrival.at_s)


def read_rates(path: Path) -> list[tuple[float, float]]:
    """(second, requests/s) of a CSV with `t_s` and `total_rate_rps`."""
    return [(float(row["t_s"]), float(row["total_rate_rps"])) for row in _rows(path)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        if ".jsonl" in path.name:
            yield from map(json.loads, file)
        else:
            yield from csv.DictReader(file)


def _seconds(row: dict[str, Any], path: Path) -> float:
    value = _column(row, TIME_COLUMNS, path)
    if isinstance(value, int):
        return value / 1000  # JSONL traces count milliseconds
    try:
        return float(value)
    except ValueError:
        return datetime.fromisoformat(value[:26]).timestamp()


def _column(row: dict[str, Any], names: tuple[str, ...], path: Path) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{path} has none of the columns {', '.join(names)}")

"""What a simulation leaves behind: JSON of summaries and series, records line by line, pictures, and one HTML page."""

import gzip
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from core.messages.fleet import Role
from simulator.fleet_spec import FleetSpec
from simulator.plots import draw
from simulator.summary import Summary
from simulator.tables import pool_table, summary_table
from simulator.twin import Result

_STYLE = "body{font:15px system-ui;margin:2em;max-width:90em}img{max-width:100%}pre{font-size:13px;overflow-x:auto}"


def write_outputs(
    folder: Path, results: Mapping[str, Result], summaries: Mapping[str, Summary], spec: FleetSpec, title: str
) -> Path:
    """Writes all files into a folder, which is made; returns the page. Raises ConfigurationError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "title": title,
        "fleet": spec.model_dump(mode="json"),
        "runs": {name: _run(result, summaries[name]) for name, result in results.items()},
    }
    text = json.dumps(_finite(tree), allow_nan=False)
    (folder / "result.json").write_text(text)
    for name, result in results.items():
        with gzip.open(folder / f"records-{name}.jsonl.gz", "wt", compresslevel=4) as file:
            file.writelines(json.dumps(_finite(asdict(record))) + "\n" for record in result.records)
    pictures = draw(results, spec)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    page = folder / "index.html"
    page.write_text(_page(title, _tables(results, summaries), pictures, text))
    return page


def _run(result: Result, summary: Summary) -> dict[str, Any]:
    return {
        "summary": asdict(summary),
        "fleet": [asdict(point) for point in result.sampler.fleet],
        "pools": {role.value: [asdict(point) for point in result.sampler.pools[role]] for role in Role},
    }


def _tables(results: Mapping[str, Result], summaries: Mapping[str, Summary]) -> str:
    console = Console(file=StringIO(), width=60 + 60 * len(results), color_system=None)
    console.print(summary_table(summaries))
    console.print(pool_table(results))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def _page(title: str, tables: str, pictures: Mapping[str, bytes], data: str) -> str:
    images = "".join(
        f'<h2>{escape(name)}</h2><img alt="{escape(name)}" src="data:image/png;base64,{b64encode(png).decode()}">'
        for name, png in pictures.items()
    )
    embedded = data.replace("</", "<\\/")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><pre>{escape(tables)}</pre>{images}"
        f'<script type="application/json" id="result">{embedded}</script></html>\n'
    )


def _finite(tree: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for what never came."""
    if isinstance(tree, float):
        return tree if abs(tree) != float("inf") and tree == tree else None
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree

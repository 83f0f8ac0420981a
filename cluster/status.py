"""What `baton status` prints: nodes, pools, replicas, links, blocks, versions."""

from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.http_client import ask
from core.errors import InvalidParameter

SILENT_S = 3.0


def fetch_fleet(url: str, api_key: str = "") -> dict[str, Any]:
    """The answer of `/fleet`. Raises NoReplica, Unauthorized."""
    return ask("GET", f"{url}/fleet", api_key)


def set_traffic(url: str, api_key: str, weights: dict[str, float] | None) -> dict[str, Any]:
    """Shares requests out between generations; None: as before the last change. Raises NoReplica, InvalidParameter."""
    return ask("PUT", f"{url}/fleet/traffic", api_key, {"weights": weights})


def parse_weights(words: list[str]) -> dict[str, float]:
    """`v1=90 v2=10` as a mapping. Raises InvalidParameter."""
    weights = {}
    for word in words:
        generation, _, weight = word.partition("=")
        try:
            weights[generation] = float(weight)
            if not isfinite(weights[generation]):
                raise ValueError("JSON has no such number")
        except ValueError as error:
            raise InvalidParameter(f"{word!r} is not GENERATION=WEIGHT, as in v2=10", field="weights") from error
    return weights


def print_fleet(fleet: dict[str, Any], console: Console) -> None:
    """Tables; a link is shown once KV has moved over it, sizes where an autoscaler runs."""
    console.print(f"{fleet['num_reserved']} requests have a plan, {fleet['num_waiting']} wait for one")
    if fleet["traffic"]["weights"]:
        console.print(f"traffic by generation: {describe_weights(fleet['traffic']['weights'])}")
    console.print(_nodes(fleet["nodes"]))
    console.print(_loads(fleet["replicas"]))
    console.print(_origins(fleet["replicas"]))
    if fleet["sizes"]:
        console.print(_sizes(fleet["sizes"]))
    links = _links(fleet["replicas"])
    console.print(links if links.row_count else "no KV has moved between replicas yet")
    console.print(_tiers(fleet["replicas"]))


def describe_weights(weights: dict[str, float]) -> str:
    """Shares in percent."""
    total = sum(weights.values())
    return ", ".join(f"{generation} {100 * weight / total:.0f} %" for generation, weight in sorted(weights.items()))


def _nodes(nodes: list[dict[str, Any]]) -> Table:
    table = _table("nodes", "address", "name", "state", "resources")
    for node in nodes:
        resources = ", ".join(
            f"{name} {amount:g}"
            for name, amount in node["resources"].items()
            if name not in ("memory", "object_store_memory")
        )
        table.add_row(node["address"], node["hostname"], "alive" if node["alive"] else "dead", resources)
    return table


def _loads(replicas: list[dict[str, Any]]) -> Table:
    table = _table("replicas", "replica", "state", "ranks", "running", "waiting", "free blocks", "warm-up")
    for replica in _in_order(replicas):
        info, status = replica["info"], replica["status"]
        table.add_row(
            info["replica_id"],
            _state(replica),
            str(len(info["rank_addresses"])),
            str(status["num_running"]),
            str(status["num_waiting"]),
            f"{status['num_free_blocks']} of {info['num_blocks']}",
            f"{info['warm_up_s']:.1f} s",
        )
    return table


def _origins(replicas: list[dict[str, Any]]) -> Table:
    """Where they run, and what."""
    table = _table("versions", "replica", "generation", "address", "revision", "runs")
    for replica in _in_order(replicas):
        info = replica["info"]
        table.add_row(
            info["replica_id"],
            info["generation"],
            info["rank_addresses"][0],
            info["compatibility"]["weights_revision"][:12],
            f"{info['software']}, protocol {info['protocol']}",
        )
    return table


def _in_order(replicas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(replicas, key=lambda replica: (replica["info"]["role"], replica["info"]["replica_id"]))


def _sizes(sizes: list[dict[str, Any]]) -> Table:
    table = _table("autoscaling", "generation", "pool", "replicas wanted", "because")
    for size in sizes:
        table.add_row(size["generation"], size["role"], str(size["num_replicas"]), size["reason"])
    return table


def _state(replica: dict[str, Any]) -> str:
    if replica["status"]["draining"]:
        return "draining"
    return f"silent for {replica['silent_s']:.0f} s" if replica["silent_s"] > SILENT_S else "ready"


def _links(replicas: list[dict[str, Any]]) -> Table:
    table = _table("links", "from", "to", "MB moved", "transfers", "MB/s", "corrupt")
    for replica in replicas:
        for link in replica["status"]["links"]:
            table.add_row(
                link["source_id"],
                replica["info"]["replica_id"],
                f"{link['num_bytes'] / 1e6:.1f}",
                str(link["num_transfers"]),
                f"{link['bytes_per_s'] / 1e6:.0f}",
                str(link["num_corrupt"]),
            )
    return table


def _tiers(replicas: list[dict[str, Any]]) -> Table:
    table = _table("cached prefixes", "replica", "tier", "blocks", "found of wanted", "MB in", "MB out")
    for replica in replicas:
        for tier in replica["status"]["tiers"]:
            table.add_row(
                replica["info"]["replica_id"],
                tier["name"],
                f"{tier['num_cached']} of {tier['num_slots']}",
                f"{tier['num_found']} of {tier['num_wanted']}",
                f"{tier['bytes_in'] / 1e6:.1f}",
                f"{tier['bytes_out'] / 1e6:.1f}",
            )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column in ("replica", "address", "from", "to"))
    return table

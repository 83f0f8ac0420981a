"""`baton doctor`: examines this host or a cluster and prints what was found."""

import json
import os
import socket
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from cluster.doctor.examine import examine
from cluster.doctor.finding import Finding, Verdict
from cluster.doctor.host import Host
from core.errors import ConfigurationError

TOGETHER = "cluster"
COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def run_doctor(address: str, as_json: bool, console: Console) -> bool:
    """Whether no check failed. `address` empty: this host alone. Raises ConfigurationError when no cluster answers."""
    if address:
        from cluster.doctor.probe import examine_cluster

        try:
            reports, together = examine_cluster(address)
        except ConnectionError as error:
            raise ConfigurationError(f"no Ray cluster at {address}: {error}", field="cluster") from error
        found = {report.host: report.findings for report in reports} | {TOGETHER: tuple(together)}
    else:
        report = examine(socket.gethostname(), Host(os.environ), is_serving=False)
        found = {report.host: report.findings}
    is_fit = not any(finding.verdict is Verdict.FAIL for findings in found.values() for finding in findings)
    if as_json:
        print(json.dumps(as_tree(found, is_fit), indent=2))
    else:
        for name, findings in found.items():
            console.print(as_table(name, findings))
    return is_fit


def as_tree(found: Mapping[str, Sequence[Finding]], is_fit: bool) -> dict[str, object]:
    """For programs."""
    return {"ok": is_fit, "hosts": {name: [finding.as_dict() for finding in f] for name, f in found.items()}}


def as_table(name: str, findings: Sequence[Finding]) -> Table:
    """For people."""
    table = Table(title=name)
    for column in ("check", "", "read", "to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(finding.check, f"[{colour}]{finding.verdict}[/{colour}]", finding.read, finding.advice)
    return table

"""What hosts must have in common, how their clocks and links compare, and which links to measure (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import median

from cluster.doctor.finding import Finding, HostReport, fail, ok, warn

MAX_LINKS = 64
WARN_SKEW_S, FAIL_SKEW_S = 0.1, 5.0
SLOW_LINK = 0.5  # of the median


@dataclass(frozen=True)
class ClockReading:
    """Of another host's clock: asked at `asked_s`, answered at `answered_s` on ours, it showed `shown_s`."""

    asked_s: float
    shown_s: float
    answered_s: float

    @property
    def offset_s(self) -> float:
        """How far its clock is ahead, if both ways took equally long (Cristian 1989)."""
        return self.shown_s - (self.asked_s + self.answered_s) / 2

    @property
    def uncertainty_s(self) -> float:
        """Half the round trip."""
        return (self.answered_s - self.asked_s) / 2


def compare_versions(reports: Sequence[HostReport]) -> Finding:
    """Every version is the same on all hosts."""
    differing = []
    for name in sorted({name for report in reports for name in report.versions}):
        found: dict[str, list[str]] = {}
        for report in reports:
            found.setdefault(report.versions.get(name, "") or "none", []).append(report.host)
        if len(found) > 1:
            differing.append(f"{name}: " + ", ".join(f"{v} on {' '.join(hosts)}" for v, hosts in found.items()))
    if differing:
        return fail("same versions", "; ".join(differing), "install the same constraints.txt on all hosts")
    return ok("same versions", f"{len(reports)} hosts agree")


def judge_clocks(readings: Mapping[str, Sequence[ClockReading]]) -> Finding:
    """The reading with the shortest round trip counts. Nothing on the wire is a time of day, but logs are."""
    best = {host: min(found, key=lambda r: r.uncertainty_s) for host, found in readings.items()}
    read = ", ".join(f"{host} {r.offset_s * 1e3:+.1f} +- {r.uncertainty_s * 1e3:.1f} ms" for host, r in best.items())
    certain_s = max((abs(r.offset_s) - r.uncertainty_s for r in best.values()), default=0.0)
    if certain_s > FAIL_SKEW_S:
        return fail("clocks", read, "run chrony or another NTP client: logs and certificates go wrong")
    if certain_s > WARN_SKEW_S:
        return warn("clocks", read, "run chrony or another NTP client: logs of hosts cannot be put in order")
    return ok("clocks", read)


def links_to_measure(hosts: Sequence[str], limit: int = MAX_LINKS) -> tuple[tuple[str, str], ...]:
    """(from, to): all ordered pairs where `limit` allows, else each host to the next, so that all send and receive."""
    if len(hosts) * (len(hosts) - 1) <= limit:
        return tuple(permutations(hosts, 2))
    ring = zip(hosts, [*hosts[1:], hosts[0]], strict=True)
    return tuple(ring)[:limit]


def judge_links(num_hosts: int, bytes_per_s: Mapping[tuple[str, str], float | None]) -> tuple[Finding, ...]:
    """Measured links; None: it could not be connected."""
    findings = []
    measured = {link: rate for link, rate in bytes_per_s.items() if rate is not None}
    for source, destination in sorted(bytes_per_s.keys() - measured.keys()):
        advice = "open all ports between the hosts of the cluster"
        findings.append(fail("bandwidth", f"{source} -> {destination}: no connection", advice))
    if not measured:
        return tuple(findings)
    middle = median(measured.values())
    for (source, destination), rate in sorted(measured.items()):
        if rate < SLOW_LINK * middle:
            read = f"{source} -> {destination}: {rate / 1e9:.2f} GB/s, median {middle / 1e9:.2f}"
            findings.append(warn("bandwidth", read, "look at the interface and at what else uses it"))
    possible = num_hosts * (num_hosts - 1)
    low, high = min(measured.values()) / 1e9, max(measured.values()) / 1e9
    read = f"one TCP connection: {low:.2f} to {high:.2f} GB/s, {len(measured)} of {possible} ordered pairs"
    findings.append(ok("bandwidth", read if len(bytes_per_s) == possible else f"{read} (each host to the next)"))
    return tuple(findings)

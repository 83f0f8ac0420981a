"""The doctor on every node of a Ray cluster: one actor each, pinned to its node."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.bandwidth import Sink, measure
from cluster.doctor.compare import ClockReading, compare_versions, judge_clocks, judge_links, links_to_measure
from cluster.doctor.examine import examine
from cluster.doctor.finding import Finding, HostReport, fail
from cluster.doctor.host import Host

ANSWER_TIMEOUT_S = 60.0
NUM_CLOCK_READINGS = 5


@ray.remote
class Probe:
    """Lives for one examination."""

    def examine(self, name: str) -> HostReport:
        """All checks of this node."""
        return examine(name, Host(os.environ), is_serving=True)

    def now_s(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def listen(self, address: str) -> int:
        """Port of a sink for one measurement."""
        self._sink = Sink(address)
        return self._sink.port

    def measure(self, address: str, port: int) -> float | None:
        """Bytes per second to another node's sink; None when it cannot be reached."""
        try:
            return measure(address, port)
        except OSError:
            return None


def examine_cluster(address: str) -> tuple[list[HostReport], list[Finding]]:
    """Findings of every node, and those about all together. Raises ConnectionError when no cluster answers."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        nodes = {_name(node): node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        probes = {
            name: Probe.options(  # type: ignore[attr-defined]
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for name, node in nodes.items()
        }
        reports, together = [], []
        for name, answer in {name: probe.examine.remote(name) for name, probe in probes.items()}.items():
            try:
                reports.append(ray.get(answer, timeout=ANSWER_TIMEOUT_S))
            except ray.exceptions.RayError as error:
                together.append(fail("node", f"{name}: {error}", "look at its raylet's log"))
                del probes[name]
        together.append(compare_versions(reports))
        together.append(judge_clocks({name: _read_clock(probe) for name, probe in probes.items()}))
        rates = {
            (source, destination): _measure_link(probes[source], probes[destination], nodes[destination])
            for source, destination in links_to_measure(list(probes))  # one at a time: none takes from another
        }
        return reports, [*together, *judge_links(len(probes), rates)]
    finally:
        ray.shutdown()


def _name(node: Mapping[str, Any]) -> str:
    """Address and short id: several nodes may share a host."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def _read_clock(probe: Any) -> list[ClockReading]:
    readings = []
    for _ in range(NUM_CLOCK_READINGS):
        asked_s = time.time()
        shown_s = ray.get(probe.now_s.remote(), timeout=ANSWER_TIMEOUT_S)
        readings.append(ClockReading(asked_s, shown_s, time.time()))
    return readings


def _measure_link(source: Any, destination: Any, node: Mapping[str, Any]) -> float | None:
    address = node["NodeManagerAddress"]
    try:
        port = ray.get(destination.listen.remote(address), timeout=ANSWER_TIMEOUT_S)
        rate: float | None = ray.get(source.measure.remote(address, port), timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError:
        return None
    return rate

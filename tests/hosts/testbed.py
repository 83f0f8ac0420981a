"""Hosts made of namespaces (see hosts.sh), and a fleet on them that came up by `baton up`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "hosts.sh"
PYTHON = Path(sys.executable)
NET = "10.77.0.1"
NUM_HOSTS = 5
TWO_OF_EACH = {role: {"min_replicas": 2, "max_replicas": 2} for role in ("prefill", "decode")} | {
    "scheduler": {"local_prefill_max_tokens": 64}  # KV shall move, also while decode has nothing to do
}
SSH = ("-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=10")


def missing_programs() -> list[str]:
    """What this machine lacks to have hosts."""
    programs = [name for name in ("sshd", "ssh", "rsync", "ip", "unshare") if not shutil.which(name)]
    return programs if os.geteuid() == 0 else ["root", *programs]


class Hosts:
    """Some hosts on a bridge, and the operator beside it, who has a home of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clients: list[subprocess.Popen[str]] = []
        self.operator_home = folder / "operator"
        self.operator_home.mkdir(parents=True)
        self._environment = {
            "STATE": str(folder / "state"), "BIN": str(PYTHON.parent), "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        }  # fmt: skip

    @property
    def key(self) -> Path:
        """The operator's private key."""
        return self.folder / "state" / "ssh" / "operator"

    def script(self, *arguments: str, timeout_s: float = 60) -> str:
        """Runs hosts.sh; returns what it printed."""
        environment = self._environment | {"HOME": os.environ["HOME"]}
        command = ["sh", str(SCRIPT), *arguments]
        return _run(command, environment, timeout_s)

    def operator(self, *command: str, timeout_s: float = 120) -> str:
        """Runs a command where the operator sits."""
        environment = self._environment | {"HOME": str(self.operator_home)}
        return _run(["sh", str(SCRIPT), "hub", *command], environment, timeout_s)

    def on(self, host: int, command: str, timeout_s: float = 60) -> str:
        """Runs a shell command on a host."""
        return self.operator("ssh", *SSH, "-i", str(self.key), f"root@{NET}{host}", command, timeout_s=timeout_s)

    def num_bytes(self, host: int) -> tuple[int, int]:
        """Received and sent by a host's interface."""
        received, sent = map(int, self.script("bytes", str(host)).split())
        return received, sent

    def processes(self, host: int) -> list[str]:
        """Command lines on a host, beside those of sshd and of this question."""
        lines = self.on(host, "ps ax -o args=").splitlines()
        return [line for line in lines if not line.startswith(("sshd", "/usr/sbin/sshd", "ps ax", "bash -c", "sh -c"))]


@contextmanager
def running_hosts(num: int) -> Iterator[Hosts]:
    """Hosts 0 to num - 1, gone at the end with all that runs on them."""
    folder = Path(tempfile.mkdtemp(prefix="hosts", dir="/tmp"))
    hosts = Hosts(folder)
    try:
        hosts.script("up", str(num))
        for host in range(num):
            _until_reached(hosts, host)
        yield hosts
    finally:
        for client in hosts.clients:
            client.kill()
        hosts.script("down")
        shutil.rmtree(folder, ignore_errors=True)


def write_cluster_file(hosts: Hosts, num: int, prefill_hosts: tuple[int, ...]) -> Path:
    """ray_configs/clusters/on_premise.yaml with these hosts in the places where a user chooses."""
    tree = yaml.safe_load((ROOT / "ray_configs" / "clusters" / "on_premise.yaml").read_text())
    tree["provider"] |= {"head_ip": f"{NET}0", "worker_ips": [f"{NET}{i}" for i in range(1, num)]}
    tree |= {"min_workers": num - 1, "max_workers": num - 1}
    tree["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    tree["file_mounts"]["~/baton"] = str(ROOT)
    tree["setup_commands"] = []  # hosts share this machine's disk, and so its installed packages
    names = " ".join(f"{NET}{i}" for i in prefill_hosts)
    settings = f'BATON_VENV={PYTHON.parent.parent} BATON_RANKS=2 BATON_PREFILL_HOSTS="{names}" '
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        tree[commands] = [settings + _without_own_choice(command) for command in tree[commands]]
    file = hosts.folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def write_serve_file(hosts: Hosts, changes: dict, generations: tuple[str, ...] = ("v1",)) -> Path:
    """A serve config of CPU pools; each pool takes the hosts of its role."""

    def pool(role: str) -> dict:
        return {
            "min_replicas": 1, "max_replicas": 2, "kv_cache_mib": 64, "drain_timeout_s": 5,
            "resources_per_rank": {"num_cpus": 0.1, "custom": {role: 1}},
        }  # fmt: skip

    def tree(generation: str) -> dict:
        config = {
            "model": {"dtype": "float32"}, "generation": generation,
            "ingress": {"host": "0.0.0.0", "port": 8000}, "cluster": {"address": "auto", "log_dir": "/tmp/ray/baton"},
        }  # fmt: skip
        for section in ("prefill", "decode"):
            config[section] = pool(section) | changes.get(section, {})
        return config | {name: value for name, value in changes.items() if name not in config}

    applications = [
        {"name": "baton", "route_prefix": "/", "import_path": "cluster.serve_app:front", "args": tree(generations[0])}
    ]
    applications += [
        {
            "name": f"baton-{generation}", "route_prefix": None, "import_path": "cluster.serve_app:pools",
            "external_scaler_enabled": True, "args": tree(generation),
        } for generation in generations
    ]  # fmt: skip
    file = hosts.folder / f"serve-{len(generations)}.yaml"
    http = {"host": "0.0.0.0", "port": 8000}
    file.write_text(yaml.safe_dump({"proxy_location": "HeadOnly", "http_options": http, "applications": applications}))
    return file


class Fleet:
    """A running fleet, as its operator and its clients see it."""

    def __init__(self, hosts: Hosts, cluster_file: Path) -> None:
        self.hosts = hosts
        self.cluster_file = cluster_file
        secrets = (hosts.operator_home / ".baton" / "secrets").read_text()
        self.api_key = dict(line.split("=", 1) for line in secrets.splitlines())["BATON_API_KEY"]

    @property
    def url(self) -> str:
        """Where clients beside the bridge reach it."""
        return f"http://{NET}0:8000"

    def baton(self, *arguments: str, timeout_s: float = 120) -> str:
        """The command line, run by the operator."""
        key = f"BATON_API_KEY={self.api_key}"
        return self.hosts.operator("env", key, "COLUMNS=200", "baton", *arguments, timeout_s=timeout_s)

    def on_head(self, command: str, timeout_s: float = 120) -> str:
        """Runs a shell command on the head as its user would."""
        return self.hosts.on(0, f". ~/.bashrc; {command}", timeout_s)

    def status(self) -> dict:
        """The answer of /fleet."""
        return json.loads(self._get("/fleet"))

    def ready(self) -> dict[str, list[int]]:
        """Hosts of the replicas that take work, by pool."""
        hosts: dict[str, list[int]] = {"prefill": [], "decode": []}
        for replica in self.status()["replicas"]:
            if not replica["status"]["draining"] and replica["silent_s"] < 3:
                host = replica["info"]["rank_addresses"][0].split(":")[0]
                hosts[replica["info"]["role"]].append(int(host.removeprefix(NET)))
        return {role: sorted(of_pool) for role, of_pool in hosts.items()}

    def is_whole(self) -> bool:
        """Two replicas of each pool take work."""
        try:
            return {role: len(hosts) for role, hosts in self.ready().items()} == {"prefill": 2, "decode": 2}
        except (AssertionError, KeyError):
            return False

    def metrics(self) -> str:
        """The answer of /metrics."""
        return self._get("/metrics")

    def _get(self, path: str) -> str:
        return self.hosts.operator(
            "curl", "-sf", "-m", "10", "-H", f"Authorization: Bearer {self.api_key}", self.url + path
        )


@contextmanager
def fleet_from(hosts: Hosts, cluster_file: Path, serve_file: Path) -> Iterator[Fleet]:
    """From `baton up` to `baton down`."""
    hosts.operator("sh", str(ROOT / "ray_configs" / "node.sh"), "keys")
    fleet = Fleet(hosts, cluster_file)
    fleet.baton("up", str(cluster_file), str(serve_file), timeout_s=240)
    try:
        yield fleet
    finally:
        fleet.baton("down", str(cluster_file), timeout_s=180)


def _without_own_choice(command: str) -> str:
    """The start command of the file, less its example of prefill hosts."""
    head, found, rest = command.partition('BATON_PREFILL_HOSTS="')
    return head + rest.partition('" ')[2] if found else command


def _until_reached(hosts: Hosts, host: int) -> None:
    for attempt in range(20):
        try:
            hosts.on(host, "true")
            return
        except AssertionError:
            if attempt == 19:
                raise


def _run(command: list[str], environment: dict[str, str], timeout_s: float) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, (
        f"{command[:6]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout

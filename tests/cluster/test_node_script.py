"""ray_configs/node.sh with a recorder in Ray's place: what each host is started with."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "ray_configs" / "node.sh"
RECORDER = """#!/bin/sh
{ echo "$(basename "$0") $*"; env; } >> "$HOME/calls"
"""


class Host:
    """A home folder and a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.venv = folder / "venv"
        self.path = folder / "bin"
        (self.venv / "bin").mkdir(parents=True)
        self.path.mkdir()
        for program in (self.venv / "bin" / "ray", self.venv / "bin" / "python"):
            self.install(program, RECORDER)
        self.install(self.path / "nvidia-smi", "#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
        self.install(self.path / "ip", "#!/bin/sh\necho 10.0.0.1 via 10.0.0.254 dev eth0 src 10.0.0.11 uid 0\n")
        self.install(self.path / "hostname", "#!/bin/sh\necho 10.0.0.11 172.17.0.1\n")

    def install(self, file: Path, text: str) -> None:
        file.write_text(text)
        file.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> None:
        environment = {"HOME": str(self.home), "BATON_VENV": str(self.venv), **variables}
        environment["PATH"] = f"{self.path}:{os.environ['PATH']}"
        subprocess.run(["sh", SCRIPT, *arguments], env=environment, check=True, capture_output=True, timeout=20)

    @property
    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().splitlines()


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_keys_are_made_once_and_for_their_owner_alone(host):
    host.run("keys")
    token, secrets = host.home / ".ray" / "auth_token", host.home / ".baton" / "secrets"
    made = token.read_text(), secrets.read_text()
    assert len(made[0]) == 64
    assert [line.partition("=")[0] for line in made[1].splitlines()] == ["BATON_CLUSTER_SECRET", "BATON_API_KEY"]
    assert {file.stat().st_mode & 0o777 for file in (token, secrets)} == {0o600}
    host.run("keys")
    assert (token.read_text(), secrets.read_text()) == made


def test_setup_may_be_repeated_and_later_shells_find_ray(host):
    host.install(host.home / "python", RECORDER)
    host.install(host.venv / "bin" / "pip", RECORDER)
    for _ in range(2):
        host.run("setup", PYTHON=str(host.home / "python"))
    assert sum(line.startswith("pip install") for line in host.calls) == 2  # pip itself finds nothing to do
    profile = (host.home / ".bashrc").read_text()
    assert profile == f'export PATH="{host.venv}/bin:$PATH"\n'


def test_a_head_keeps_its_state_in_rocksdb_and_starts_with_the_secrets(host):
    host.run("keys")
    host.run("head", NCCL_SOCKET_IFNAME="eth9")
    assert "ray start --head --port=6379 --node-ip-address=10.0.0.11" in host.calls
    for line in (
        "RAY_gcs_storage=rocksdb",
        f"RAY_gcs_storage_path={host.home}/.baton/gcs",
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={host.home}/.ray/auth_token",
        "RAY_health_check_period_ms=500",
        "RAY_SERVE_ENABLE_HA_PROXY=1",
        "NCCL_SOCKET_IFNAME=eth9",
    ):
        assert line in host.calls
    assert any(line.startswith("BATON_CLUSTER_SECRET=") for line in host.calls)
    assert (host.home / ".baton" / "gcs_keeper.pid").read_text().strip().isdigit()


def test_a_head_that_ray_up_made_takes_its_cluster_file_and_may_use_redis(host):
    (host.home / "ray_bootstrap_config.yaml").touch()
    host.run("head", RAY_REDIS_ADDRESS="redis:6379")
    start = next(line for line in host.calls if line.startswith("ray start"))
    assert start.endswith(f"--autoscaling-config={host.home}/ray_bootstrap_config.yaml")
    assert "RAY_gcs_storage=rocksdb" not in host.calls


@pytest.mark.parametrize(
    ("role", "variables", "resources"),
    [
        ([], {}, ""),
        (["decode"], {}, ' --resources={"decode":8}'),
        (["decode"], {"BATON_RANKS": "4"}, ' --resources={"decode":4}'),
        (["by_host"], {"BATON_PREFILL_HOSTS": "10.0.0.10 10.0.0.11"}, ' --resources={"prefill":8}'),
        (["by_host"], {"BATON_PREFILL_HOSTS": "10.0.0.111"}, ' --resources={"decode":8}'),
    ],
)
def test_a_worker_joins_with_the_resource_of_its_role(host, role, variables, resources):
    host.run("worker", *role, RAY_HEAD_IP="10.0.0.1", **variables)
    assert f"ray start --address=10.0.0.1:6379 --node-ip-address=10.0.0.11{resources}" in host.calls


def test_a_worker_without_a_head_is_refused(host):
    with pytest.raises(subprocess.CalledProcessError):
        host.run("worker")


def test_stop_leaves_a_process_alone_that_only_has_the_keepers_number(host):
    (host.home / ".baton").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (host.home / ".baton" / "gcs_keeper.pid").write_text(str(other.pid))
        host.run("stop")
        assert other.poll() is None
        other.kill()
    assert "ray stop" in host.calls

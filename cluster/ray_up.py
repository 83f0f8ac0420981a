"""A fleet from a `ray up` file: start its hosts, deploy to them, end them. Thin over Ray's own commands.

Ray's local provider leaves the workers' processes running when a cluster goes down; `take_down` ends them too.
"""

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.nodes import list_nodes
from core.config import load_config
from core.errors import ConfigurationError

REMOTE_CONFIG = "~/baton-serve.yaml"  # where the head keeps what was deployed last
SSH_TIMEOUT_S = 10
DRAIN_MARGIN_S = 60.0  # beyond the pools' own drain timeouts

Say = Callable[[str], None]


@dataclass(frozen=True)
class ClusterFile:
    """The parts of a cluster file that Ray's commands leave to us."""

    path: Path
    provider: str
    hosts: tuple[str, ...]  # of provider `local`, the head first; empty for clouds, which end their own machines
    ssh_user: str
    ssh_key: str
    num_hosts: int  # that are started at once, the head included


def read_cluster_file(path: Path) -> ClusterFile:
    """Raises ConfigurationError naming what is missing."""
    try:
        tree: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("provider"), dict) or "type" not in tree["provider"]:
        raise ConfigurationError(f"{path} is no cluster file for `ray up`: provider.type is missing", field="provider")
    provider, auth = tree["provider"], tree.get("auth") or {}
    is_local = provider["type"] == "local"
    if is_local and not provider.get("head_ip"):
        raise ConfigurationError(f"{path}: provider.head_ip is missing", field="provider.head_ip")
    hosts = (provider["head_ip"], *provider.get("worker_ips", ())) if is_local else ()
    types = tree.get("available_node_types") or {}
    num_workers = max(tree.get("min_workers", 0), sum(kind.get("min_workers", 0) for kind in types.values()))
    user, key = auth.get("ssh_user", ""), auth.get("ssh_private_key", "")
    return ClusterFile(path, provider["type"], hosts, user, key, 1 + num_workers)


def bring_up(cluster: ClusterFile, serve_file: Path, say: Say) -> None:
    """Starts the hosts and deploys; returns when the fleet answers. Raises ConfigurationError."""
    load_config(serve_file)  # a wrong file should not cost the start of a cluster
    say("starting hosts")
    _ray("up", "--yes", "--no-config-cache", str(cluster.path))
    say("deploying")
    _ray("rsync-up", str(cluster.path), str(serve_file), REMOTE_CONFIG)
    _ray("exec", str(cluster.path), f"baton deploy {REMOTE_CONFIG} --hosts {cluster.num_hosts}")


def take_down(cluster: ClusterFile, drain_timeout_s: float, say: Say) -> None:
    """Drains the fleet, then ends Ray everywhere. Raises ConfigurationError naming hosts that could not be reached."""
    say("draining replicas")
    try:
        _ray("exec", str(cluster.path), "serve shutdown --yes", timeout_s=drain_timeout_s + DRAIN_MARGIN_S)
    except ConfigurationError as error:
        say(f"not drained: {error.message}")
    say("ending Ray")
    _ray("down", "--yes", str(cluster.path))
    failures = [f"{host} ({why})" for host in reversed(cluster.hosts) if (why := _end_ray_on(cluster, host))]
    if failures:
        raise ConfigurationError(f"Ray may still run on {', '.join(failures)}", field="provider")


def deploy_here(serve_file: Path, num_hosts: int, say: Say, timeout_s: float) -> str:
    """On a node of the cluster: hands the applications to Serve and waits until they answer; returns the URL.

    Waits for `num_hosts` before, so that replicas spread over all of them. A second deployment changes what differs.
    Raises ConfigurationError.
    """
    config = load_config(serve_file)
    import ray

    from cluster.readiness import wait_until_ready

    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        _wait_for_hosts(num_hosts, say, timeout_s)
        _run([str(Path(sys.executable).with_name("serve")), "deploy", str(serve_file)])
        url = f"http://127.0.0.1:{config.ingress.port}"
        wait_until_ready(url, say, timeout_s)
    finally:
        ray.shutdown()
    return url


def _wait_for_hosts(num_hosts: int, say: Say, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    said = 0
    while (num_alive := sum(node["alive"] for node in list_nodes())) < num_hosts:
        if num_alive != said:
            say(f"{num_alive} of {num_hosts} hosts have joined")
            said = num_alive
        if time.monotonic() > deadline:
            raise ConfigurationError(f"{num_alive} of {num_hosts} hosts joined within {timeout_s:.0f} s")
        time.sleep(0.5)


def _end_ray_on(cluster: ClusterFile, host: str) -> str:
    """Why it did not, or nothing."""
    key = ("-i", str(Path(cluster.ssh_key).expanduser())) if cluster.ssh_key else ()
    target = f"{cluster.ssh_user}@{host}" if cluster.ssh_user else host
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}", "-o", "StrictHostKeyChecking=no")
    command = ["ssh", *key, *options, "-o", "UserKnownHostsFile=/dev/null", target]
    ended = subprocess.run([*command, "bash -lc 'ray stop --grace-period 20'"], capture_output=True, check=False)
    if ended.returncode == 0:
        return ""
    said = (ended.stderr or ended.stdout).decode(errors="replace").strip().splitlines()
    return f"status {ended.returncode}: {said[-1] if said else 'no output'}"


def _ray(*arguments: str, timeout_s: float | None = None) -> None:
    _run([str(Path(sys.executable).with_name("ray")), *arguments], timeout_s)


def _run(command: Sequence[str], timeout_s: float | None = None) -> None:
    # Ray's newer autoscaler counts the head among a local provider's workers
    environment = os.environ | {"RAY_UP_enable_autoscaler_v2": "0"}
    try:
        subprocess.run(command, env=environment, check=True, timeout=timeout_s)
    except subprocess.CalledProcessError as error:
        raise ConfigurationError(f"`{shlex.join(command)}` ended with status {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"`{shlex.join(command)}` took longer than {timeout_s:.0f} s") from error

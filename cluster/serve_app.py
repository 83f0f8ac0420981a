"""What `serve deploy` builds: `cluster.serve_app:front` once, `cluster.serve_app:pools` for every generation.

Both take our configuration tree as `args`.
"""

from typing import Any

from ray.serve import Application

from cluster import deployments
from cluster.settings import with_model
from core.config import BatonConfig, config_with_secrets


def front(args: dict[str, Any]) -> Application:
    """Called by Serve on a node of the cluster; secrets come from that node's environment.

    Raises ConfigurationError, which Serve shows as the application's status.
    """
    return deployments.front(on_cluster(config_with_secrets(args)))


def pools(args: dict[str, Any]) -> Application:
    """Like `front`."""
    return deployments.pools(on_cluster(config_with_secrets(args)))


def on_cluster(config: BatonConfig) -> BatonConfig:
    """The configuration as replicas of an existing cluster use it: reached at their nodes' addresses, not loopback.

    Raises ConfigurationError, without a secret too.
    """
    config.cluster.security.check("every node's address")
    address = "auto" if config.cluster.address == "local" else config.cluster.address
    config = with_model(config, config.model.path)
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": address})})

"""The Serve application: Ingress, GlobalScheduler, PrefillPool, DecodePool, and how they are wired."""

from typing import Any

from ray import serve

from cluster.ingress_replica import Ingress
from cluster.scaling import POOL_NAMES
from cluster.scheduler_replica import GlobalScheduler
from cluster.supervisor import Supervisor
from core.config import BatonConfig, PoolConfig
from core.messages.fleet import Role

HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 15.0


def build_application(config: BatonConfig) -> serve.Application:
    """The whole application of one configuration."""
    common: dict[str, Any] = {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": 0},
    }
    scheduler = serve.deployment(**common)(GlobalScheduler).bind(config)
    pools = [
        _pool(POOL_NAMES[role], pool).bind(role, config, scheduler)
        for role, pool in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode))
    ]
    ingress = serve.deployment(
        **common,
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=10,
    )(serve.ingress()(Ingress))
    return ingress.bind(config, scheduler, *pools)


def _pool(name: str, pool: PoolConfig) -> Any:
    """One deployment per pool; a placement group per replica, one bundle per rank, all on one node."""
    resources = pool.resources_per_rank
    bundle = {"CPU": resources.num_cpus, **resources.custom}
    if resources.num_gpus:
        bundle["GPU"] = resources.num_gpus
    if resources.accelerator_type:
        bundle[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    return serve.deployment(
        name=name,
        num_replicas=max(1, pool.min_replicas),  # Serve starts no deployment at 0; the autoscaler may go there
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle] * pool.tensor_parallel,
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=pool.drain_timeout_s + 15,
    )(Supervisor)

"""The Serve applications: the front (Ingress, GlobalScheduler), and per generation PrefillPool, DecodePool and, when
it scales, PoolAutoscaler.
"""

from typing import Any

from ray import serve

from cluster.autoscaler_replica import PoolAutoscaler
from cluster.ingress_replica import Ingress
from cluster.names import AUTOSCALER_NAME, POOL_NAMES, SCHEDULER_NAME, STANDBY_NAME
from cluster.scheduler_replica import GlobalScheduler
from cluster.supervisor import Supervisor, leave_timeout_s
from core.config import BatonConfig, PoolConfig, TransferConfig
from core.messages.fleet import Role

HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 15.0
ON_HEAD = {"node:__internal_head__": 0.001}  # what everybody needs shares the head's fate, not that of a GPU host


def front(config: BatonConfig) -> serve.Application:
    """Ingress and global scheduler, with its standby when one is configured."""
    names = (SCHEDULER_NAME, STANDBY_NAME) if config.scheduler.standby else (SCHEDULER_NAME,)
    schedulers = [serve.deployment(**_common(ON_HEAD), name=name)(GlobalScheduler).bind(config) for name in names]
    ingress = serve.deployment(
        **_common(ON_HEAD),
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=config.ingress.drain_timeout_s,
    )(serve.ingress()(Ingress))
    return ingress.bind(config, *schedulers)


def pools(config: BatonConfig) -> serve.Application:
    """Both pools of one generation, and what sizes them when that is configured."""
    others = [_pool(Role.PREFILL, config.prefill, config.transfer).bind(Role.PREFILL, config)]
    if config.autoscaling.is_active:
        others.append(serve.deployment(**_common(ON_HEAD), name=AUTOSCALER_NAME)(PoolAutoscaler).bind(config))
    decode = _pool(Role.DECODE, config.decode, config.transfer)
    application: serve.Application = decode.bind(Role.DECODE, config, *others)
    return application


def _common(resources: dict[str, float]) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": 0, "resources": resources},
    }


def _pool(role: Role, pool: PoolConfig, transfer: TransferConfig) -> Any:
    """One deployment per pool; a placement group per replica, one bundle per rank, all on one node."""
    resources = pool.resources_per_rank
    bundle = {"CPU": resources.num_cpus, **resources.custom}
    if resources.num_gpus:
        bundle["GPU"] = resources.num_gpus
    if resources.accelerator_type:
        bundle[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    return serve.deployment(
        **_common({}),
        name=POOL_NAMES[role],
        num_replicas=max(1, pool.min_replicas),  # Serve starts no deployment at 0; the autoscaler may go there
        placement_group_bundles=[bundle] * pool.num_ranks,
        placement_group_strategy="STRICT_PACK",
        graceful_shutdown_timeout_s=leave_timeout_s(pool, transfer),
    )(Supervisor)

"""What Serve's applications and deployments are called.

The front (ingress and global scheduler) outlives the generations of pools, each an application of its own.
"""

from core.messages.fleet import Role

FRONT_NAME = "baton"
SCHEDULER_NAME = "GlobalScheduler"
STANDBY_NAME = "StandbyScheduler"
AUTOSCALER_NAME = "PoolAutoscaler"
POOL_NAMES = {Role.PREFILL: "PrefillPool", Role.DECODE: "DecodePool"}


def pools_name(generation: str) -> str:
    """The application that holds both pools of a generation."""
    return f"{FRONT_NAME}-{generation}"

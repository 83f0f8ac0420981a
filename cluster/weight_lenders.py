"""Which ranks of a fleet may have the weights that a new replica needs. Pure."""

import random
from collections.abc import Sequence

from core.config import PoolConfig
from core.messages.to_scheduler import ReplicaState

_MAX_LENDERS = 3  # asked in turn; when all refuse, the disk is there


def weight_lenders(
    replicas: Sequence[ReplicaState], model: str, pool: PoolConfig, zone: str, rng: random.Random
) -> tuple[tuple[str, ...], ...]:
    """For each rank of the new replica, the addresses to ask, those of its zone first; others take other replicas.

    Only ranks of equal number in replicas of equal degrees hold the same share. Whether the weights themselves are the
    same, lender and borrower find out.
    """
    able = [
        replica.info
        for replica in replicas
        if replica.info.compatibility.model == model
        and replica.info.layout.tensor_parallel == pool.tensor_parallel
        and replica.info.layout.pipeline_parallel == pool.pipeline_parallel
        and not replica.status.draining
    ]
    rng.shuffle(able)
    able.sort(key=lambda info: info.zone != zone)
    chosen = able[:_MAX_LENDERS]
    return tuple(tuple(info.rank_addresses[rank] for info in chosen) for rank in range(pool.num_ranks))

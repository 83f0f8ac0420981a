"""The limits of both pools: min and max of each, and what all replicas together may cost."""

from collections.abc import Mapping
from dataclasses import dataclass

from core.config import BatonConfig, PoolConfig
from core.messages.fleet import Role


@dataclass(frozen=True)
class PoolLimits:
    """`cost` is the GPUs of one replica; in a pool without GPUs, its ranks."""

    min_replicas: int
    max_replicas: int
    cost: float

    @classmethod
    def of(cls, pool: PoolConfig) -> "PoolLimits":
        """The limits that a pool's section sets."""
        return cls(pool.min_replicas, pool.max_replicas, pool.replica_cost)


class Budget:
    """Fits what is wanted into what there is. `max_cost` 0 is no limit."""

    def __init__(self, limits: Mapping[Role, PoolLimits], max_cost: float) -> None:
        self._limits = dict(limits)
        self._max_cost = max_cost or float("inf")

    @classmethod
    def of(cls, config: BatonConfig) -> "Budget":
        """The limits of a configuration."""
        limits = {Role.PREFILL: PoolLimits.of(config.prefill), Role.DECODE: PoolLimits.of(config.decode)}
        return cls(limits, config.autoscaling.max_gpus)

    def fit(self, wanted: Mapping[Role, int], held: Mapping[Role, int]) -> dict[Role, int]:
        """Never below min, never above max, never above the budget (which covers all mins).

        What a pool holds and still wants stays its own; the rest is given out one by one to the pool that has the
        smaller share of its wish, so that both come short by the same share and prefill : decode stays as wished. Even
        shares go to decode: there, running streams suffer, while prefill's requests wait in the scheduler's queue.
        """
        granted = {role: limits.min_replicas for role, limits in self._limits.items()}
        clipped = {role: min(wanted[role], limits.max_replicas) for role, limits in self._limits.items()}
        kept = {role: min(clipped[role], held[role]) for role in clipped}
        for goal in (kept, clipped):
            self._give_out(granted, goal, wanted)
        return granted

    def _give_out(self, granted: dict[Role, int], goal: Mapping[Role, int], wanted: Mapping[Role, int]) -> None:
        while True:
            short = [role for role in granted if granted[role] < goal[role] and self._affords(granted, role)]
            if not short:
                return
            granted[min(short, key=lambda role: (granted[role] / wanted[role], role is Role.PREFILL))] += 1

    def _affords(self, granted: Mapping[Role, int], role: Role) -> bool:
        spent = sum(num * self._limits[of].cost for of, num in granted.items())
        return spent + self._limits[role].cost <= self._max_cost

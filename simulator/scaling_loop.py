"""The production autoscaling in the loop: targets every interval, replicas that take their time to come. Pure."""

from cluster.autoscaling.autoscaling import Autoscaling
from cluster.autoscaling.budget import Budget, PoolLimits
from cluster.autoscaling.policy import make_policy
from cluster.autoscaling.signals import PoolTarget, Targets
from core.messages.fleet import Role
from simulator.events import TIMER
from simulator.fleet import GENERATION, Fleet
from simulator.fleet_spec import FleetSpec
from simulator.host import World

AUTOSCALER = (1 << 30) + 2


class ScalingLoop:
    """The twin of cluster/autoscaler.py and of the pools that it resizes."""

    def __init__(self, world: World, fleet: Fleet, spec: FleetSpec) -> None:
        self._world = world
        self._fleet = fleet
        self._config = spec.autoscaling
        limits = {role: _limits(spec, role) for role in Role}
        budget = Budget(limits, spec.autoscaling.max_gpus)
        self._autoscaling = Autoscaling(spec.autoscaling, make_policy(spec.autoscaling), budget)
        pools = {role: spec.pool(role) for role in Role}
        self._asked = {role: PoolTarget(pool.replicas if pool else 0, "as found") for role, pool in pools.items()}
        self._next_index = {role: target.num_replicas for role, target in self._asked.items()}
        self._starting: dict[Role, list[int]] = {role: [] for role in Role}  # indices that are to come
        self.history: list[tuple[float, Targets]] = []

    def start(self) -> None:
        """Begins to decide."""
        self._world.queue.at(self._world.queue.now + self._config.interval_s, TIMER, AUTOSCALER, self._tick)

    def _tick(self) -> None:
        scheduler = self._fleet.scheduler
        if scheduler.alive:
            targets = self._autoscaling.decide(scheduler.signals(GENERATION, self._asked, self._config.interval_s))
            self.history.append((self._world.queue.now, targets))
            for role in Role:
                self._resize(role, targets.of(role).num_replicas - self._asked[role].num_replicas)
                self._asked[role] = targets.of(role)
        self.start()

    def _resize(self, role: Role, num_more: int) -> None:
        for _ in range(num_more):
            index = self._next_index[role]
            self._next_index[role] += 1
            self._starting[role].append(index)
            ready_at = self._world.queue.now + self._config.replica_start_s
            self._world.queue.at(ready_at, TIMER, AUTOSCALER, self._ready, role, index)
        for _ in range(-num_more):
            if self._starting[role]:
                self._starting[role].pop()  # nobody will miss it
                continue
            staying = [replica.host.info for replica in self._fleet.in_pool(role) if not replica.host.draining]
            if staying:
                self._fleet.drain(staying[-1].replica_id)

    def _ready(self, role: Role, index: int) -> None:
        if index in self._starting[role]:
            self._starting[role].remove(index)
            self._fleet.add(role, index)


def _limits(spec: FleetSpec, role: Role) -> PoolLimits:
    pool = spec.pool(role)
    if pool is None:
        return PoolLimits(0, 0, 1.0)
    return PoolLimits(pool.min_replicas, pool.max_replicas or pool.replicas, float(pool.tensor_parallel))

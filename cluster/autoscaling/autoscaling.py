"""From signals to targets: policy, floors, dead band, budget, delays, budget again."""

from collections.abc import Mapping

from cluster.autoscaling.budget import Budget
from cluster.autoscaling.forecast import ForecastFloor, make_forecaster
from cluster.autoscaling.policy import Policy, make_policy
from cluster.autoscaling.schedule import Schedule
from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand, PoolTarget, Targets
from cluster.autoscaling.smoothing import Smoothing, outside_dead_band
from core.autoscaling_config import AutoscalingConfig
from core.config import BatonConfig
from core.messages.fleet import Role


class Autoscaling:
    """One per generation of pools.

    The budget comes twice: first it shares out what is wanted, so that delays work on wishes that can come true; at the
    end it holds back growth until the other pool has given up what it has to.
    """

    def __init__(self, config: AutoscalingConfig, policy: Policy, budget: Budget) -> None:
        self._policy = policy
        self._budget = budget
        self._schedule = Schedule(config.schedule)
        self._forecast = ForecastFloor(make_forecaster(config.forecast), config)
        self._smoothing = {role: Smoothing(config) for role in Role}
        self._dead_band = config.dead_band

    @classmethod
    def of(cls, config: BatonConfig) -> "Autoscaling":
        """As a configuration says. Raises ConfigurationError."""
        return cls(config.autoscaling, make_policy(config.autoscaling), Budget.of(config))

    def decide(self, signals: FleetSignals) -> Targets:
        """What both pools shall have now. Call it at a steady interval: delays are counted by `signals.now`."""
        demand = self._demand(signals)
        current = {role: signals.of(role).num_target for role in Role}
        wanted = {
            role: outside_dead_band(demand.of(role).num_replicas, current[role], self._dead_band) for role in Role
        }
        shared = self._budget.fit(wanted, dict.fromkeys(Role, 0))
        calm = {role: self._smoothing[role].step(signals.now, shared[role], current[role]) for role in Role}
        fitted = self._budget.fit(calm, current)
        return Targets(
            *(
                PoolTarget(fitted[role], self._reason(role, demand, shared, fitted))
                for role in (Role.PREFILL, Role.DECODE)
            )
        )

    def _demand(self, signals: FleetSignals) -> Demand:
        """The largest of what the load, the clock and the last days ask for."""
        demands = (self._policy.demand(signals), self._schedule.floor(signals.wall), self._forecast.floor(signals))
        return Demand(
            max((demand.prefill for demand in demands), key=_num_replicas),
            max((demand.decode for demand in demands), key=_num_replicas),
        )

    @staticmethod
    def _reason(role: Role, demand: Demand, shared: Mapping[Role, int], fitted: Mapping[Role, int]) -> str:
        own = demand.of(role)
        if fitted[role] != shared[role]:
            return f"{own.reason}: {own.num_replicas:.2f} needed, on the way to {shared[role]}"
        return f"{own.reason}: {own.num_replicas:.2f} needed"


def _num_replicas(demand: PoolDemand) -> float:
    return demand.num_replicas

"""Whatever the load and the policy say: never above the budget, never below min, never above max."""

from dataclasses import replace
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling.autoscaling import Autoscaling
from cluster.autoscaling.budget import Budget, PoolLimits
from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand, PoolSignals, Workload
from core.autoscaling_config import AutoscalingConfig
from core.messages.fleet import Role
from tests.autoscaling.closed_loop import NOON, config_of

P, D = Role.PREFILL, Role.DECODE
counts = st.integers(0, 40)
limits = st.builds(
    lambda least, more, cost: PoolLimits(least, max(1, least + more), cost),
    st.integers(0, 4), st.integers(0, 10), st.sampled_from([0.5, 1.0, 2.0, 8.0]),
)  # fmt: skip
pools = st.builds(
    PoolSignals,
    num_ready=st.integers(0, 12),
    num_target=st.integers(0, 12),
    num_waiting=st.integers(0, 500),
    queued_prompt_tokens=st.integers(0, 10**7),
    outstanding_prompt_tokens=st.integers(0, 10**6),
    prefill_tokens_per_s=st.sampled_from([0.0, 100.0, 10_000.0]),
    num_running=st.integers(0, 500),
    max_num_seqs=st.sampled_from([0, 8, 64]),
    kv_usage=st.floats(0, 1),
    itl_s=st.floats(0, 2),
)
workloads = st.builds(Workload, st.floats(0, 100), st.floats(0, 10_000), st.floats(0, 100))


class Nervous:
    """A policy that says what it is told to."""

    def __init__(self) -> None:
        self.says = (0.0, 0.0)

    def demand(self, signals):
        return Demand(*(PoolDemand(num, "so I was told") for num in self.says))


@given(limits, limits, st.floats(0, 60), counts, counts, counts, counts)
def test_what_is_granted_is_within_all_limits_and_nothing_is_left_over(p, d, spare, want_p, want_d, held_p, held_d):
    least = p.min_replicas * p.cost + d.min_replicas * d.cost
    max_cost = least + spare or 1.0
    granted = Budget({P: p, D: d}, max_cost).fit({P: want_p, D: want_d}, {P: held_p, D: held_d})
    spent = granted[P] * p.cost + granted[D] * d.cost
    assert spent <= max_cost
    for role, pool, wanted in ((P, p, want_p), (D, d, want_d)):
        assert pool.min_replicas <= granted[role] <= pool.max_replicas
        assert granted[role] <= max(wanted, pool.min_replicas)
        if granted[role] < min(wanted, pool.max_replicas):
            assert spent + pool.cost > max_cost, "short although there is money"


def test_both_pools_come_short_by_the_same_share_and_keep_what_they_hold():
    budget = Budget({role: PoolLimits(1, 100, 1) for role in Role}, 12)
    assert budget.fit({P: 40, D: 20}, {P: 0, D: 0}) == {P: 8, D: 4}
    assert budget.fit({P: 40, D: 20}, {P: 2, D: 10}) == {P: 2, D: 10}
    assert budget.fit({P: 40, D: 9}, {P: 2, D: 10}) == {P: 3, D: 9}
    small = Budget({role: PoolLimits(1, 20, 1) for role in Role}, 12)
    assert small.fit({P: 200, D: 20}, {P: 0, D: 0}) == {P: 10, D: 2}, (
        "the ratio is that of the wishes, not of the limits"
    )
    costly = Budget({P: PoolLimits(1, 100, 1), D: PoolLimits(1, 100, 8)}, 20)
    assert costly.fit({P: 10, D: 10}, {P: 0, D: 0}) == {P: 4, D: 2}


def decided(autoscaling: Autoscaling, signals: FleetSignals) -> tuple[int, int]:
    targets = autoscaling.decide(signals)
    return targets.prefill.num_replicas, targets.decode.num_replicas


@settings(deadline=None)
@given(st.lists(st.tuples(pools, pools, workloads), min_size=1, max_size=30), st.integers(4, 20))
def test_the_slo_policy_stays_within_limits_whatever_it_sees(seen, max_gpus):
    config = config_of(min_replicas=2, max_replicas=9, max_gpus=max_gpus, downscale_delay_s=3, downscale_pause_s=0)
    autoscaling = Autoscaling.of(config)
    for i, (prefill, decode, workload) in enumerate(seen):
        signals = FleetSignals(float(i), NOON + timedelta(seconds=i), prefill, decode, workload)
        num = decided(autoscaling, signals)
        assert all(2 <= n <= 9 for n in num) and sum(num) <= max_gpus, num


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=40))
def test_so_does_any_policy_of_ones_own(demands):
    policy, idle = Nervous(), PoolSignals(1, 1, 0, 0, 0, 1000.0, 0, 8, 0.0, 0.0)
    autoscaling = Autoscaling(
        AutoscalingConfig(upscale_delay_s=0, downscale_delay_s=0, downscale_pause_s=0),
        policy,
        Budget({P: PoolLimits(1, 10, 2.0), D: PoolLimits(1, 30, 1.0)}, 24),
    )
    pool = {P: idle, D: idle}
    for i, policy.says in enumerate(demands):
        targets = autoscaling.decide(FleetSignals(float(i), NOON, pool[P], pool[D], Workload(0, 0, 0)))
        num = {role: targets.of(role).num_replicas for role in Role}
        assert 1 <= num[P] <= 10 and 1 <= num[D] <= 30 and 2 * num[P] + num[D] <= 24
        pool = {role: replace(idle, num_ready=num[role], num_target=num[role]) for role in Role}

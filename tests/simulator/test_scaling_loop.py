"""The production autoscaling around a simulated fleet: replicas come when they have started, and go when they rest."""

from core.messages.fleet import Role
from simulator.twin import Twin
from tests.simulator.costs import AffineCost, small_fleet, traced

AUTOSCALING = {
    "policy": "slo",
    "interval_s": 1.0,
    "replica_start_s": 10.0,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": 20.0,
    "downscale_pause_s": 5.0,
    "ttft_target_s": 0.5,
    "itl_target_s": 0.05,
}


def fleet(**changes):
    return small_fleet(
        1,
        1,
        prefill__max_replicas=4,
        decode__max_replicas=4,
        autoscaling=AUTOSCALING,
        sample_s=1.0,
        scheduler__local_prefill_max_tokens=0,
        scheduler__queue_timeout_s=600.0,
        **changes,
    )


def rush(until_s: float, per_s: float, quiet_until_s: float) -> list:
    """A rush, then one request a second."""
    requests, now = [], 1.0
    while now < quiet_until_s:
        number = len(requests)
        requests.append(traced(number, now, tuple(range(100 * number, 100 * number + 30)), 10))
        now += 1 / per_s if now < until_s else 1.0
    return requests


def sizes(twin: Twin, role: Role) -> dict[float, int]:
    return {round(point.time_s): point.num_replicas for point in twin.sampler.pools[role]}


def test_a_rush_brings_replicas_after_their_start_and_rest_takes_them_back():
    costs = {role: AffineCost(base_s=0.02, prompt_s=2e-3) for role in Role}  # 12 prompts a second at most
    twin = Twin(fleet(), costs, seed=1)
    trace = rush(until_s=40.0, per_s=25.0, quiet_until_s=150.0)
    result = twin.run(trace)
    assert all(record.is_completed for record in result.records) and len(result.records) == len(trace)
    found = sizes(twin, Role.PREFILL)
    asked_at = next(time for time, targets in twin.scaling.history if targets.prefill.num_replicas > 1)
    first_more = min(time for time, num in found.items() if num > 1)
    assert asked_at + 10.0 <= first_more <= asked_at + 11.0
    assert max(found.values()) >= 3
    assert found[max(found)] == 1
    served = {record.prefill for record in result.records}
    assert {"prefill-0", "prefill-1", "prefill-2"} <= served
    for replica in twin.fleet.replicas.values():
        assert replica.host.pool.num_held == 0


def test_the_rush_waits_less_with_it_than_without():
    costs = {role: AffineCost(base_s=0.02, prompt_s=2e-3) for role in Role}
    trace = rush(until_s=40.0, per_s=25.0, quiet_until_s=42.0)
    still = fleet().model_copy(update={"autoscaling": fleet().autoscaling.model_copy(update={"policy": "fixed"})})
    grown, fixed = (Twin(spec, costs, seed=1).run(trace).records for spec in (fleet(), still))
    assert sum(r.ttft_s for r in grown) < 0.7 * sum(r.ttft_s for r in fixed)


def test_runs_with_autoscaling_repeat():
    costs = {role: AffineCost(base_s=0.02, prompt_s=2e-3) for role in Role}
    trace = rush(until_s=20.0, per_s=25.0, quiet_until_s=60.0)
    first, second = (Twin(fleet(), costs, seed=1, skips=skips).run(trace).records for skips in (True, False))
    assert repr(first) == repr(second)

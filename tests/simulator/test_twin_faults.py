"""What befalls a fleet: every request still has one outcome, nothing is left, and the harm is where it belongs."""

import pytest

from simulator.fleet_spec import FleetSpec
from simulator.records import COMPLETED
from simulator.twin import Twin
from tests.simulator.costs import COSTS, small_fleet
from tests.simulator.test_whole_fleets import everything, play, random_trace

QUICK = {"control_timeout_s": 0.2, "data_timeout_s": 0.5, "lease_ttl_s": 1.5}
FAULTS = {
    "slow prefill": {"kind": "slow_replica", "replica": "prefill-0", "at_s": 0.2, "speed": 0.25},
    "slow decode": {"kind": "slow_replica", "replica": "decode-0", "at_s": 0.2, "speed": 0.25},
    "slow port": {"kind": "slow_link", "replica": "prefill-1", "at_s": 0.1, "speed": 0.1},
    "slow way": {"kind": "slow_link", "replica": "prefill-1", "to": "decode-1", "speed": 0.1},
    "liar": {"kind": "lying_replica", "replica": "decode-1", "at_s": 0.1},
    "dead prefill": {"kind": "dead_replica", "replica": "prefill-0", "at_s": 0.3},
    "dead decode": {"kind": "dead_replica", "replica": "decode-0", "at_s": 0.3, "back_after_s": 0.4},
    "restart": {"kind": "scheduler_restart", "at_s": 0.3, "down_s": 0.5},
    "burst": {"kind": "burst", "at_s": 0.2, "over_s": 0.5},
}


def fleet(*faults: dict) -> FleetSpec:
    return small_fleet(2, 2, transfer=QUICK, faults=faults, scheduler__local_prefill_max_tokens=4)


@pytest.mark.parametrize("name", FAULTS)
def test_nobody_is_lost_and_nothing_is_left(name):
    trace = random_trace(11, num_requests=80)
    twin, result = play(fleet(FAULTS[name]), trace)
    assert sorted(r.request_id for r in result.records) == sorted(r.request_id for r in trace)
    lengths = {request.request_id: request.num_output_tokens for request in trace}
    assert all(r.num_output_tokens == lengths[r.request_id] for r in result.records if r.is_completed)
    assert sum(r.is_completed for r in result.records) >= 78
    for replica in twin.fleet.replicas.values():
        assert replica.is_idle and replica.host.pool.num_held == replica.host.pool.num_promised == 0
        replica.host.pool.validate()
    assert len(twin.world.network) == 0 and len(twin.scheduler.admission.reservations) == 0


@pytest.mark.parametrize("name", FAULTS)
def test_skipping_equals_stepping_under_faults(name):
    trace = random_trace(12, num_requests=50)
    runs = [play(fleet(FAULTS[name]), trace, skips=skips)[1] for skips in (True, False)]
    assert repr(everything(runs[0])) == repr(everything(runs[1]))


def test_requests_of_a_dead_decode_replica_go_on_elsewhere():
    trace = random_trace(11, num_requests=80)
    _, result = play(fleet(FAULTS["dead decode"]), trace)
    moved = [r for r in result.records if r.num_attempts > 1]
    assert moved and all(r.outcome in COMPLETED for r in moved)
    assert max(r.itl_max_s for r in moved) > 0.02  # the gap of a resume shows


def test_a_clock_that_is_ahead_changes_nothing():
    trace = random_trace(13)
    plain = play(fleet(), trace)[1]
    skews = [{"kind": "skewed_clock", "replica": name, "offset_s": 1000.0} for name in ("prefill-0", "decode-1")]
    skewed = play(fleet(*skews), trace)[1]
    for mine, other in zip(plain.records, skewed.records, strict=True):
        assert (mine.request_id, mine.prefill, mine.decode) == (other.request_id, other.prefill, other.decode)
        assert mine.finished_s == pytest.approx(other.finished_s, abs=1e-9)


def test_while_the_scheduler_is_down_ingresses_plan_alone():
    trace = random_trace(14, num_requests=140)
    down = {"kind": "scheduler_restart", "at_s": 0.6, "down_s": 20.0}  # when ingresses have read the address book
    _, result = play(fleet(down), trace)
    alone = [r for r in result.records if r.reason == "fallback"]
    assert result.num_planned_alone >= len(alone) > 40
    assert all(r.is_completed for r in result.records)


def test_a_restarted_scheduler_hears_of_every_replica_within_a_heartbeat():
    twin = Twin(fleet({"kind": "scheduler_restart", "at_s": 0.3, "down_s": 0.1}), COSTS, seed=2)
    twin.run(random_trace(15, num_requests=150))
    assert {replica.info.replica_id for replica in twin.scheduler.admission.fleet} == set(twin.fleet.replicas)


def test_a_liar_is_given_more_than_its_share():
    trace = random_trace(16, num_requests=100)
    colocated = {"scheduler__max_decode_kv_usage": 1.0}

    def share(*faults: dict) -> float:
        spec = small_fleet(0, 3, faults=faults, **colocated)
        records = play(spec, trace)[1].records
        return sum(r.decode == "decode-1" for r in records) / len(records)

    assert share(FAULTS["liar"]) >= share()


def test_a_burst_comes_at_once():
    trace = random_trace(17, num_requests=60)
    spec = fleet(FAULTS["burst"])
    arrivals = [r.arrived_s for r in play(spec, trace)[1].records]
    crowd = sum(0.2 <= request.arrival_s < 0.7 for request in trace)
    assert arrivals.count(0.2) == crowd > 10

"""What the autoscaler is told of a scheduler's state: load, those who wait and for whom, workload."""

from dataclasses import replace

import pytest

from cluster.autoscaling.signals import FleetSignals, PoolTarget
from cluster.scheduler.admission import Admission
from cluster.scheduler.fleet_signals import fleet_signals
from cluster.scheduler.workload_meter import WorkloadMeter
from core.block_hash import hash_blocks
from core.config import SchedulerConfig
from core.errors import NoReplica, Overloaded, PromptTooLong
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress
from tests.autoscaling.closed_loop import NOON
from tests.cluster.test_scheduler import BLOCK, replica, report, reserve

ASKED = {Role.PREFILL: PoolTarget(3, "load"), Role.DECODE: PoolTarget(2, "load")}


@pytest.fixture
def admission() -> Admission:
    """Two prefill and two decode replicas of four slots; plans as in tests/cluster/test_scheduler.py."""
    config = SchedulerConfig(queue_timeout_s=30, replica_timeout_s=100, local_prefill_max_tokens=0)
    admission = Admission(config, rate_window_s=10)
    for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        admission.report(report(replica(name, role), snapshot=True), 0.0)
    return admission


def signals_of(admission: Admission, now: float = 0.0) -> FleetSignals:
    return fleet_signals(admission, "", ASKED, now, NOON)


def fill(admission: Admission, role: Role, now: float = 0.0) -> None:
    """Both replicas of a pool as full as they get."""
    for name in ("0", "1"):
        full = {"num_waiting_tokens": 2000} if role is Role.PREFILL else {"num_running": 4, "decode_step_s": 0.03}
        admission.report(report(replica(role.value[0] + name, role), **full), now)


def test_an_idle_fleet(admission):
    signals = signals_of(admission)
    assert (signals.prefill.num_ready, signals.prefill.num_target, signals.prefill.num_starting) == (2, 3, 1)
    assert (signals.decode.num_ready, signals.decode.num_starting) == (2, 0)
    assert (signals.prefill.prefill_tokens_per_s, signals.decode.max_num_seqs) == (1000, 4)
    assert (signals.decode.num_running, signals.decode.kv_usage, signals.decode.itl_s) == (0, 0, 0)
    assert signals.workload.requests_per_s == 0
    assert signals.predicted_ttft_s == 0


def test_plans_count_at_once_and_reports_later(admission):
    for i in range(4):
        admission.reserve(reserve(f"r{i}", tokens=tuple(range(i * 500, i * 500 + 200))), 0.0)
    admission.dispatch(0.0)
    signals = signals_of(admission)
    assert signals.prefill.outstanding_prompt_tokens == 800
    assert signals.decode.num_running == 4
    assert signals.decode.kv_usage == pytest.approx(4 * 13 / 2000), "13 blocks of each prompt, of 1000 on each"
    assert signals.predicted_ttft_s == pytest.approx((800 / 2 + 200) / 1000)
    admission.report(report(replica("d0", Role.DECODE), num_running=3, num_free_blocks=500, decode_step_s=0.02), 1.0)
    admission.report(report(replica("d1", Role.DECODE), decode_step_s=9.0), 1.0)
    signals = signals_of(admission, 1.0)
    assert signals.decode.num_running == 5
    assert signals.decode.itl_s == 0.02, "a replica that decodes nothing has nothing to tell"


def test_who_waits_counts_where_there_is_no_room(admission):
    fill(admission, Role.DECODE)
    admission.reserve(reserve("r"), 0.0)
    assert admission.dispatch(0.0) == []
    signals = signals_of(admission)
    assert (signals.prefill.num_waiting, signals.decode.num_waiting) == (0, 1)
    assert signals.prefill.queued_prompt_tokens == 0, "prefill has nothing to do: another replica would not help"
    fill(admission, Role.PREFILL)
    signals = signals_of(admission)
    assert (signals.prefill.num_waiting, signals.decode.num_waiting) == (1, 1)
    assert signals.prefill.queued_prompt_tokens == 200
    admission.report(report(replica("d0", Role.DECODE), num_running=1), 0.0)
    assert signals_of(admission).decode.num_waiting == 0


def test_who_waits_as_steps_of_batches_are_too_long_counts_at_decode(admission):
    prompts = {"num_running": 1, "num_waiting": 1, "num_waiting_tokens": 9000}
    for name in ("d0", "d1"):
        admission.report(report(replica(name, Role.DECODE), **prompts), 0.0)
    fill(admission, Role.PREFILL)
    admission.reserve(reserve("r"), 0.0)
    assert admission.dispatch(0.0) == []
    signals = signals_of(admission)
    assert (signals.prefill.num_waiting, signals.decode.num_waiting) == (1, 1)


def test_where_nobody_prefills_who_waits_counts_at_decode(admission):
    for name in ("p0", "p1"):
        admission.replica_lost(name)
    for name in ("d0", "d1"):
        admission.report(report(replica(name, Role.DECODE), num_waiting=1, num_waiting_tokens=1100), 0.0)
    admission.reserve(reserve("r"), 0.0)
    assert admission.dispatch(0.0) == []
    assert signals_of(admission).decode.num_waiting == 1


def test_queued_tokens_are_counted_as_far_as_they_are_computed(admission):
    tokens = tuple(range(320))
    for name in ("p0", "p1"):
        admission.report(report(replica(name, Role.PREFILL), stored=hash_blocks(tokens[:256], BLOCK)), 0.0)
    admission.reserve(reserve("warm", tokens), 0.0)
    admission.dispatch(0.0)
    fill(admission, Role.PREFILL)
    fill(admission, Role.DECODE)
    admission.reserve(reserve("next", tokens), 0.0)
    assert admission.dispatch(0.0) == []
    assert signals_of(admission).workload.prompt_tokens_per_request == 64
    assert signals_of(admission).prefill.queued_prompt_tokens == 64


def test_decoding_is_timed_from_the_first_token_and_aborted_requests_are_not(admission):
    for name in ("r", "aborted"):
        admission.reserve(reserve(name), 0.0)
    admission.dispatch(0.0)
    admission.progress(Progress("r"), 1.0)
    admission.finish("r", 0, 4.0)
    admission.finish("aborted", 0, 9.0)
    assert signals_of(admission, 9.0).workload.decode_s_per_request == 3.0


def test_a_retry_is_no_new_request(admission):
    for attempt in range(3):
        admission.reserve(reserve("r", attempt=attempt), 0.0)
    assert signals_of(admission).workload.requests_per_s == pytest.approx(0.1)


def test_the_rate_follows_within_its_window_and_is_forgotten():
    meter, rates = WorkloadMeter(window_s=10), {}
    for tenth in range(1, 1201):
        now = tenth / 10
        if now <= 60:
            meter.arrived(now)
        rates[now] = meter.measured(now).requests_per_s
    assert rates[10.0] == pytest.approx(10 * 0.632, rel=0.02)
    assert rates[60.0] == pytest.approx(10.0, rel=0.02)
    assert rates[70.0] == pytest.approx(10 * 0.368, rel=0.02)
    meter.arrived(130.0)
    assert meter.measured(200.0).requests_per_s == 0.0


def test_requests_wait_for_a_decode_replica_as_long_as_an_autoscaler_is_there_to_bring_it():
    admission = Admission(SchedulerConfig(queue_limit=2, queue_timeout_s=30, no_replica_timeout_s=5))
    admission.sizes.ask("v1", {Role.DECODE: PoolTarget(0, "no load")}, until=25.0)
    for name in ("a", "b"):
        admission.reserve(reserve(name), 0.0)
    with pytest.raises(Overloaded):
        admission.reserve(reserve("c"), 0.0)
    assert admission.expire(24.0) == {}
    assert all(isinstance(error, NoReplica) for error in admission.expire(26.0).values())


def test_every_generation_is_told_of_its_own_load(admission):
    """Two generations, a tenth of the traffic for the second: what comes, waits and is planned is shared out so."""
    for name, role in (("p2", Role.PREFILL), ("d2", Role.DECODE)):
        info = replace(replica(name, role), generation="v2")
        admission.report(report(info, snapshot=True), 0.0)
    admission.traffic.change({"": 9.0, "v2": 1.0})
    num_of = {"": 0, "v2": 0}
    for i in range(400):
        admission.reserve(reserve(f"r{i}"), 0.0)
    for plan in admission.dispatch(0.0):
        num_of[plan.decode.generation] += 1
    first, second = (fleet_signals(admission, generation, ASKED, 0.0, NOON) for generation in ("", "v2"))
    assert (first.prefill.num_ready, second.prefill.num_ready) == (2, 1)
    assert (first.decode.num_running, second.decode.num_running) == (num_of[""], num_of["v2"])
    assert first.workload.requests_per_s + second.workload.requests_per_s == pytest.approx(40)
    assert 0.05 < second.workload.requests_per_s / 40 < 0.15
    assert (first.decode.num_waiting, second.decode.num_waiting) == tuple(
        len(admission.waiting_for(generation, 0.0)) for generation in ("", "v2")
    )
    assert first.decode.num_waiting + second.decode.num_waiting == admission.num_waiting == 400 - sum(num_of.values())
    assert 0 < second.decode.num_waiting < first.decode.num_waiting


def test_a_generation_scaled_to_zero_is_told_of_who_waits_for_it_until_it_has_asked_for_a_replica(admission):
    admission.traffic.change({"v2": 1.0})
    admission.sizes.ask("v2", {Role.DECODE: PoolTarget(0, "no load")}, until=100.0)
    admission.reserve(reserve("r"), 0.0)
    assert admission.dispatch(0.0) == []
    asleep = fleet_signals(admission, "v2", ASKED, 0.0, NOON)
    assert (asleep.decode.num_waiting, asleep.workload.requests_per_s) == (1, pytest.approx(0.1))
    admission.sizes.ask("v2", {Role.DECODE: PoolTarget(1, "load")}, until=100.0)
    assert [plan.decode.generation for plan in admission.dispatch(1.0)] == [""], "meanwhile others answer"


def test_a_request_that_waited_for_replicas_too_small_for_it_fails_and_holds_nobody_up():
    admission = Admission(SchedulerConfig(queue_timeout_s=30))
    admission.reserve(reserve("long", tokens=tuple(range(5000))), 0.0)
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        admission.report(report(replica(name, role), snapshot=True), 1.0)
    assert isinstance(admission.expire(1.0)["long"], PromptTooLong)
    assert admission.num_waiting == 0

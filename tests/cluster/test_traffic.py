"""Two generations side by side: shares, stickiness, what a restarted scheduler learns, way back."""

from collections import Counter
from dataclasses import replace

import pytest

from cluster.scheduler.admission import Admission
from cluster.scheduler.traffic import TrafficSplit
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Traffic
from tests.cluster.test_scheduler import plan_one, replica, report, reserve


def shares(split: TrafficSplit, generations=("v1", "v2"), num: int = 4000) -> dict[str, float]:
    chosen = Counter(split.choose(f"request-{i}", generations) for i in range(num))
    return {generation: count / num for generation, count in chosen.items()}


def test_requests_are_shared_out_by_weight_and_a_request_stays_where_it_fell():
    split = TrafficSplit("v1")
    assert shares(split) == {"v1": 1.0}, "a second generation comes up unnoticed"
    assert shares(split, ("v2", "v3")) == pytest.approx({"v2": 0.5, "v3": 0.5}, abs=0.03)
    split.change({"v2": 5})
    assert shares(split) == {"v2": 1.0}, "a generation without a weight gets nothing"
    split.change({"v1": 90})
    split.change({"v1": 90, "v2": 10})
    assert shares(split) == pytest.approx({"v1": 0.9, "v2": 0.1}, abs=0.03)
    assert len({split.choose("r", ("v1", "v2")) for _ in range(10)}) == 1
    split.roll_back()
    assert shares(split) == {"v1": 1.0}
    assert shares(split, ("v2",)) == {"v2": 1.0}, "weights do not keep a request from the only one that runs"


def test_a_restarted_scheduler_learns_the_newest_weights_from_replicas():
    split = TrafficSplit()
    for traffic in (Traffic(2, {"v2": 1}), Traffic(3, {"v1": 1}), Traffic(1, {"v2": 5})):
        split.learn(traffic)
    assert split.traffic == Traffic(3, {"v1": 1})
    assert split.change({"v2": 1}).version == 4


@pytest.fixture
def admission() -> Admission:
    admission = Admission(SchedulerConfig(local_prefill_max_tokens=0))
    for generation in ("v1", "v2"):
        for role in Role:
            info = replace(replica(f"{role.value}-{generation}", role), generation=generation)
            admission.report(report(info, snapshot=True), 0.0)
    return admission


def test_pairs_form_within_a_generation(admission):
    for weights, expected in (({"v1": 1}, "v1"), ({"v2": 1}, "v2")):
        admission.traffic.change(weights)
        for i in range(3):
            plan = plan_one(admission, reserve(f"{expected}{i}", tokens=tuple(range(i * 300, i * 300 + 200))))
            assert (plan.prefill.generation, plan.decode.generation) == (expected, expected)
            admission.finish(f"{expected}{i}", 0, 0.0)


def test_tokens_that_were_shown_bind_a_request_to_its_generation_while_that_lives(admission):
    admission.traffic.change({"v2": 1})
    assert plan_one(admission, reserve("r", attempt=1, generation="v1")).decode.generation == "v1"
    admission.replica_lost("decode-v1")
    assert plan_one(admission, reserve("r", attempt=2, generation="v1")).decode.generation == "v2"


def test_a_request_goes_to_a_generation_that_can_hold_it(admission):
    admission.traffic.change({"v1": 1})
    small = replace(replica("decode-v1", Role.DECODE), generation="v1", max_model_len=100)
    admission.report(report(small), 0.0)
    assert plan_one(admission, reserve("long", tokens=tuple(range(200)))).decode.generation == "v2"
    assert plan_one(admission, reserve("short", tokens=tuple(range(50)))).decode.generation == "v1"


def test_a_full_generation_does_not_hold_up_the_other(admission):
    admission.report(report(replace(replica("decode-v1", Role.DECODE), generation="v1"), num_running=4), 0.0)
    for name, generation in (("first", "v1"), ("second", "v2"), ("third", "v1")):
        admission.reserve(reserve(name, generation=generation), 0.0)
    assert [plan.request_id for plan in admission.dispatch(0.0)] == ["second"]
    admission.report(report(replace(replica("decode-v1", Role.DECODE), generation="v1"), num_running=2), 0.1)
    assert [plan.request_id for plan in admission.dispatch(0.1)] == ["first", "third"]

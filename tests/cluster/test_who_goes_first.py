"""In which order waiting requests get plans: classes, due times, tenants by weight; who is refused, who yields."""

from collections import Counter
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.admission import Admission
from cluster.scheduler.fair_share import FairShare
from cluster.scheduler.pace import Pace
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.site import Site
from cluster.scheduler.step_costs import StepCosts
from cluster.scheduler.wait_forecast import WaitForecast
from core.block_hash import hash_blocks
from core.config import SchedulerConfig
from core.errors import Overloaded
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import Progress, ReplicaStatus, Report, Reserve, TokenPace

BLOCK = 16
SLOTS = 4


def decode_replica(name: str = "d0", num_blocks: int = 1000) -> ReplicaInfo:
    layout = KVLayout(2, 2, 8, BLOCK, "float32", 1)
    same = Compatibility("m", "r", "float32", BLOCK, "h")
    return ReplicaInfo(name, Role.DECODE, 1, (f"{name}:1",), layout, same, num_blocks, SLOTS, 512, 4096)


def report(info: ReplicaInfo, num_running: int = 0) -> Report:
    status = ReplicaStatus(0, num_running, 0, info.num_blocks - 10 * num_running, 0, False, 1000.0, 0.01, 0)
    return Report(info, 0, True, status, (), ())


def request(name: str, tenant: str = "", num_tokens: int = 100, **changes) -> Reserve:
    first = crc32(f"{tenant}/{name}".encode()) % 10**6
    tokens = tuple(range(first, first + num_tokens))
    fields = {"max_new_tokens": 16, "timeout_s": 60.0} | changes
    return Reserve(
        fields.pop("request_id", name),
        0,
        "i",
        num_tokens,
        block_hashes=hash_blocks(tokens, BLOCK),
        tenant=tenant,
        **fields,
    )


class Fleet:
    """One decode replica that prefills by itself; `free` lets so many requests end."""

    def __init__(self, **config) -> None:
        self.admission = Admission(SchedulerConfig(**({"queue_limit": 100} | config)))
        self.info = decode_replica()
        self.running: list[Reserve] = []
        self.admission.report(report(self.info), 0.0)

    def ask(self, *requests: Reserve, now: float = 0.0) -> None:
        for one in requests:
            self.admission.reserve(one, now)

    def plans(self, now: float = 0.0) -> list[str]:
        started = [plan.request_id for plan in self.admission.dispatch(now)]
        self.running += started
        return started

    def end(self, request_id: str, now: float = 0.0, num_output_tokens: int = 16) -> list[str]:
        """Lets one end, and returns whom that gives a plan."""
        self.running.remove(request_id)
        self.admission.finish(request_id, 0, now, num_output_tokens)
        self.admission.report(report(self.info), now)
        return self.plans(now)

    def order(self, num: int, now: float = 0.0) -> list[str]:
        """Who gets the next plans when the oldest running request ends each time."""
        started: list[str] = []
        while len(started) < num:
            started += self.end(self.running[0], now)
        return started


def test_first_tokens_that_are_due_first_go_first_and_batch_goes_last():
    fleet = Fleet()
    fleet.ask(*(request(f"running{i}") for i in range(SLOTS)))
    assert len(fleet.plans()) == SLOTS
    fleet.ask(
        request("batch", slo_class="batch"),
        request("standard"),
        request("interactive", slo_class="interactive"),
        request("urgent", ttft_slo_s=0.1),
        request("preferred", priority=5),
        request("batch preferred", slo_class="batch", priority=9),
    )
    order = fleet.order(6)
    assert order == ["preferred", "urgent", "interactive", "standard", "batch preferred", "batch"]


def test_a_flood_costs_another_tenant_no_more_than_its_part():
    fleet = Fleet()
    fleet.ask(*(request(f"flood{i}", "a") for i in range(80)))
    fleet.plans()
    fleet.ask(request("one", "b"))
    assert fleet.order(1) == ["one"]
    fleet.ask(*(request(f"more{i}", "b") for i in range(10)))
    turns = Counter(name.rstrip("0123456789") for name in fleet.order(20))
    assert turns == {"more": 10, "flood": 10}


def test_tenants_share_tokens_by_weight():
    fleet = Fleet(tenant_weights={"gold": 3.0})
    fleet.ask(*(request(f"gold{i}", "gold") for i in range(40)), *(request(f"tin{i}", "tin") for i in range(40)))
    fleet.plans()
    turns = Counter(name.rstrip("0123456789") for name in fleet.order(40))
    assert turns["gold"] == pytest.approx(30, abs=1)


def test_long_prompts_and_long_answers_count_by_their_tokens():
    fleet = Fleet()
    fleet.ask(*(request(f"long{i}", "l", num_tokens=400, max_new_tokens=1) for i in range(20)))
    fleet.ask(*(request(f"short{i}", "s", num_tokens=100, max_new_tokens=1) for i in range(60)))
    fleet.plans()
    turns: Counter[str] = Counter()
    for _ in range(40):
        turns.update(name.rstrip("0123456789") for name in fleet.end(fleet.running[0], num_output_tokens=1))
    assert turns["short"] == pytest.approx(4 * turns["long"], rel=0.2)


def test_answers_that_became_longer_than_expected_are_charged_at_their_end():
    share = FairShare({})
    share.taken("r", "a", 100, 10)
    assert share.served("a") == 120
    share.ended("r", 60)
    assert share.served("a") == 220
    share.ended("r", 60)
    assert share.served("a") == 220
    share.taken("lost", "a", 10, 5)
    share.ended("lost", None)
    assert share.served("a") == 240


def test_nobody_saves_up_service_by_staying_away():
    fleet = Fleet()
    fleet.ask(*(request(f"busy{i}", "busy") for i in range(40)))
    fleet.plans()
    fleet.order(20)
    fleet.ask(*(request(f"back{i}", "back") for i in range(20)))
    turns = Counter(name.rstrip("0123456789") for name in fleet.order(16))
    assert turns == {"busy": 8, "back": 8}


@given(
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2),
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 50)), min_size=60, max_size=120),
)
def test_tenants_that_always_wait_are_served_alike_to_within_two_requests(weights, sizes):
    """The bound of the paper: backlogged tenants differ by twice the largest request, over weight, at most."""
    share = FairShare(weights)
    for tenant in weights:
        share.arrived(tenant, weights.keys())
    worth: Counter[str] = Counter()
    for number, (prompt, output) in enumerate(sizes):
        tenant = min(weights, key=share.served)
        share.taken(str(number), tenant, prompt, output)
        share.ended(str(number), output)
        worth[tenant] += prompt + 2 * output
    served = [worth[tenant] / weights[tenant] for tenant in weights]
    assert max(served) - min(served) <= 2 * 600 / min(weights.values())


def test_a_full_line_pushes_out_the_last_of_who_fills_it():
    fleet = Fleet(queue_limit=10)
    fleet.ask(*(request(f"running{i}") for i in range(SLOTS)))
    fleet.plans()
    fleet.ask(*(request(f"flood{i}", "a") for i in range(10)))
    with pytest.raises(Overloaded, match="10 requests wait already"):
        fleet.ask(request("flood10", "a"))
    fleet.ask(request("one", "b"))
    refused = fleet.admission.expire(0.0)
    assert list(refused) == ["flood9"]
    assert isinstance(refused["flood9"], Overloaded) and refused["flood9"].retry_after_s >= 1.0
    assert fleet.admission.num_waiting == 10
    assert fleet.order(2) == ["flood0", "one"]


def test_a_wait_in_vain_is_refused_at_once_and_retry_after_is_honest():
    """One request of 100 tokens ends a second: 100 tokens/s. 30 s of waiting are allowed."""
    fleet = Fleet(queue_timeout_s=30.0)
    fleet.ask(*(request(f"r{i}") for i in range(SLOTS + 20)))
    fleet.plans()
    for second in range(1, 11):
        assert len(fleet.end(fleet.running[0], float(second))) == 1
    fleet.ask(*(request(f"more{i}") for i in range(20)), now=10.0)  # 30 wait: the last one for 30 s
    with pytest.raises(Overloaded, match="a wait of 31 s is foreseen, 30 s are allowed") as refusal:
        fleet.ask(request("late"), now=10.0)
    assert refusal.value.retry_after_s == pytest.approx(1.0, abs=0.5)
    fleet.ask(request("patient", slo_class="batch"), now=10.0)  # may wait for minutes
    with pytest.raises(Overloaded) as refusal:
        fleet.ask(request("long", num_tokens=1500), now=10.0)
    assert refusal.value.retry_after_s == pytest.approx(15.0, abs=2.0)
    for second in range(11, 27):
        fleet.end(fleet.running[0], float(second))
    fleet.ask(request("long", num_tokens=1500), now=26.0)
    fleet.ask(request("other tenant", "b"), now=26.0)  # waits behind its own requests and its part alone


def test_a_forecast_says_nothing_before_it_has_seen_anyone_wait():
    forecast = WaitForecast()
    forecast.passed(0.0, False)
    forecast.passed(10.0, False)
    assert forecast.wait_s(1000, 100) is None
    forecast.passed(12.0, True)
    assert forecast.wait_s(1000, 400) == 5.0  # as if 400 tokens in 2 s
    forecast.dispatched(500)
    assert forecast.wait_s(1000, 400) == pytest.approx(4.0, rel=0.01)
    assert forecast.retry_after_s(100.0, 30.0) == 70.0
    assert forecast.retry_after_s(1e9, 30.0) == 600.0


def test_who_comes_while_one_long_prompt_is_computed_is_not_refused():
    """3000 tokens at 1000 a second: for more than 2 s nothing moves."""
    fleet = Fleet(queue_timeout_s=30.0)
    fleet.ask(request("long", num_tokens=3000))
    assert fleet.plans() == ["long"]
    fleet.ask(request("one"), now=0.1)
    for tenth in range(2, 24):
        assert fleet.plans(tenth / 10) == []
    fleet.ask(request("other", num_tokens=300), now=2.3)
    assert fleet.plans(2.6) == ["other"], "which can be in time"
    assert fleet.plans(2.9) == ["one"]


def test_many_who_come_while_one_long_prompt_is_computed_are_not_refused():
    """4000 tokens at 1000 a second; ten requests of 100 a second come meanwhile, and wait for 7 s at most."""
    fleet = Fleet(queue_timeout_s=10.0)
    fleet.ask(request("long", num_tokens=4000))
    assert fleet.plans() == ["long"]
    for tenth in range(1, 34):
        fleet.ask(request(f"short{tenth}"), now=tenth / 10)
        assert fleet.plans(tenth / 10) == []
    assert fleet.admission.num_waiting == 33
    fleet.admission.progress(Progress("long"), 4.0)
    assert fleet.admission.reservations.num_prompt_tokens == 0
    fleet.admission.report(report(fleet.info, 1), 4.0)
    assert fleet.plans(4.0) == ["short22", "short23", "short24"], "which can be in time"
    assert fleet.admission.reservations.num_prompt_tokens == 300


def decoding(fleet: Fleet, *names: str) -> None:
    for name in names:
        fleet.admission.progress(Progress(name), 0.0)


def test_batch_work_yields_to_others_youngest_first_and_comes_back_later():
    fleet = Fleet(max_batch_kv_usage=1.0, slo={"interactive": {"ttft_s": 1.0, "itl_s": 1.0}}, itl_slo_s=1.0)
    batch = [request(f"batch{i}", slo_class="batch") for i in range(SLOTS)]
    for number, one in enumerate(batch):
        fleet.ask(one, now=number / 10)
        assert fleet.plans(number / 10) == [f"batch{number}"]
    decoding(fleet, *(one.request_id for one in batch))
    fleet.admission.report(report(fleet.info, SLOTS), 1.0)
    fleet.ask(request("person"), now=1.0)
    assert fleet.plans(1.0) == []
    (yielding,) = fleet.admission.take_yields()
    assert (yielding.request_id, yielding.attempt, yielding.decode.replica_id) == ("batch3", 0, "d0")
    assert fleet.plans(1.0) == [] and fleet.admission.take_yields() == []  # one at a time
    assert fleet.end("batch3", 1.1) == ["person"]
    fleet.ask(replace(batch[3], attempt=1), now=1.1)
    assert fleet.plans(1.1) == []
    assert fleet.admission.take_yields() == []  # batch work makes no batch work yield
    assert fleet.end("person", 2.0) == ["batch3"]


def test_batch_work_leaves_room_for_others():
    fleet = Fleet(max_batch_kv_usage=0.3)
    fleet.ask(request("person", num_tokens=1600))
    assert fleet.plans() == ["person"]
    fleet.ask(request("batch", num_tokens=3200, slo_class="batch"), now=1.2)
    assert fleet.plans(1.2) == []
    fleet.ask(request("other person", num_tokens=3200), now=1.5)
    assert fleet.plans(1.5) == ["other person"]  # less than a step of the first prompt is left


def test_who_has_waited_too_long_lets_those_go_first_who_can_be_in_time():
    """Nobody is refused, and who is late keeps its place among the late."""
    fleet = Fleet(slo={"standard": {"ttft_s": 0.9, "itl_s": 0.1}})
    fleet.ask(*(request(f"running{i}") for i in range(SLOTS)))
    fleet.plans()
    fleet.ask(request("old0"), request("old1"), now=0.0)
    fleet.ask(request("new"), now=0.8)
    for name, expected in (("running0", "new"), ("running1", "old0"), ("running2", "old1")):
        assert fleet.end(name, 0.8) == [expected]


def held_up(**config) -> Fleet:
    """512 tokens a step, 1000 a second; a first prompt is computed for 1.6 s, and nobody is given out meanwhile."""
    fleet = Fleet(slo={"standard": {"ttft_s": 4.0, "itl_s": 1.0}}, itl_slo_s=1.0, **config)
    fleet.ask(request("first", num_tokens=1600))
    assert fleet.plans() == ["first"]
    return fleet


def later(fleet: Fleet, num: int) -> list[str]:
    """The next plans, while the replica computes one prompt after the other."""
    started: list[str] = []
    computed = [("first", 1.6)]
    for tenth in range(1, 100):
        now = tenth / 10
        for name in fleet.plans(now):
            num_tokens = fleet.admission.reservations.find(name).request.num_tokens
            computed.append((name, max(now, computed[-1][1]) + num_tokens / 1000))
            started.append(name)
        for name, ended_at in computed:
            if now - 0.1 < ended_at <= now:
                fleet.admission.finish(name, 0, now, 1)
        if len(started) == num:
            return started
    raise AssertionError(started)


def test_a_long_prompt_goes_behind_those_who_would_all_be_late_with_it():
    fleet = held_up()
    fleet.ask(request("long", num_tokens=1800), *(request(f"short{i}", num_tokens=600) for i in range(3)))
    assert later(fleet, 4) == ["short0", "short1", "short2", "long"]


def test_a_long_prompt_keeps_its_turn_while_all_can_be_in_time():
    fleet = held_up()
    fleet.ask(request("long", num_tokens=1200), request("short", num_tokens=200))
    assert later(fleet, 2) == ["long", "short"]


def test_what_several_have_in_common_counts_once():
    """Four questions about one new document: 1.74 s of work, not 6."""
    fleet, document = held_up(), tuple(range(1440))
    for name in range(4):
        hashes = hash_blocks((*document, *range(5000 + 100 * name, 5060 + 100 * name)), BLOCK)
        fleet.ask(replace(request(f"question{name}", num_tokens=1500), block_hashes=hashes))
    fleet.ask(request("short", num_tokens=300))
    assert fleet.plans(0.1) == []
    assert not any(one.is_put_off for one in fleet.admission._line)
    fleet.ask(request("other", num_tokens=1500))
    assert fleet.plans(0.2) == []
    assert [one.request.request_id for one in fleet.admission._line if one.is_put_off] == ["other"]


def test_a_long_prompt_of_higher_priority_goes_behind_nobody():
    """Of the others the longest does."""
    fleet = held_up()
    fleet.ask(request("long", num_tokens=1800, priority=1))
    fleet.ask(request("medium", num_tokens=400), request("short", num_tokens=300))
    assert fleet.plans(0.1) == []
    assert {one.request.request_id: one.is_put_off for one in fleet.admission._line} == {
        "long": False,
        "medium": True,
        "short": False,
    }
    assert later(fleet, 3) == ["long", "short", "medium"]


def test_who_asks_for_what_is_impossible_is_put_off_for_its_length_alone():
    fleet = held_up()
    fleet.ask(*(request(f"short{i}", num_tokens=300) for i in range(2)))
    fleet.ask(request("hasty", num_tokens=100, ttft_slo_s=0.01))
    assert later(fleet, 3) == ["hasty", "short0", "short1"]


def test_one_tenants_long_prompts_make_no_others_late():
    """Each has its half: of the own ones the long one goes behind, and the other tenant's keep their turns."""
    fleet = held_up()
    fleet.ask(request("own long", "a", num_tokens=1500), request("own short", "a", num_tokens=300))
    fleet.ask(request("other", "b", num_tokens=800))
    order = later(fleet, 3)
    assert order.index("own short") < order.index("own long")
    assert order.index("other") < 2


def test_many_tenants_who_want_little_take_little_of_anothers_part():
    fleet = held_up()
    fleet.ask(request("long", "a", num_tokens=1200), request("short", "a", num_tokens=200))
    fleet.ask(*(request("tiny", f"b{i}", num_tokens=10, request_id=f"tiny{i}") for i in range(9)))
    assert fleet.plans(0.1) == []
    assert not any(one.is_put_off for one in fleet.admission._line)


def test_steps_that_seem_to_cost_nothing_are_no_reason_to_fail():
    """A fit may find that all of a step's time is attention."""
    told = report(decode_replica())
    site = Site(ReplicaView(told.info, told.status, 0.0), 0)
    site.refresh(StepCosts(0.0, 0.0, 1e-7, 0.0, 0.01, 0.0, 0.0), 0.9)
    pace = Pace.of([site], 0.2, are_decodes=True)
    assert 0 < pace.work_s(100, 100) < 0.01


def test_who_comes_back_in_the_middle_of_its_answer_is_not_put_off():
    fleet = Fleet(slo={"standard": {"ttft_s": 0.9, "itl_s": 0.1}})
    fleet.ask(*(request(f"running{i}") for i in range(SLOTS)))
    fleet.plans()
    fleet.ask(request("old"), replace(request("resumed"), attempt=1, num_shown=1), now=0.0)
    fleet.ask(request("new"), now=0.8)
    for name, expected in (("running0", "resumed"), ("running1", "new"), ("running2", "old")):
        assert fleet.end(name, 0.8) == [expected]


def test_who_insists_on_decode_alone_holds_up_nobody_whom_prefill_replicas_serve():
    fleet = Fleet()
    prefill = replace(fleet.info, replica_id="p0", role=Role.PREFILL, rank_addresses=("p0:1",))
    fleet.admission.report(report(prefill), 0.0)
    fleet.ask(*(request(f"alone{i}", num_tokens=600, placement="local") for i in range(2)), request("other"))
    plans = {plan.request_id: plan for plan in fleet.admission.dispatch(0.0)}
    assert plans.keys() == {"alone0", "alone1", "other"}
    assert plans["alone1"].prefill is None and plans["other"].prefill == prefill


def test_a_prompt_waits_while_a_full_step_is_to_be_computed_before_it():
    """1000 tokens/s in steps of 512: of 1600 tokens a step is left after 1.088 s."""
    fleet = Fleet()
    fleet.ask(request("first", num_tokens=1600))
    assert fleet.plans() == ["first"]
    fleet.ask(request("second"))
    assert fleet.plans(0.0) == [] and fleet.plans(1.08) == []
    assert fleet.plans(1.1) == ["second"]


def test_a_decision_is_remembered_with_what_it_weighed_and_what_came():
    fleet = Fleet(decisions_kept=1)
    fleet.ask(request("call-0", num_tokens=200), now=1.0)
    fleet.plans(3.0)
    (decision,) = fleet.admission.decisions.find("chatcmpl-call")
    assert (decision.queue_s, decision.is_over, decision.actual_first_token_s) == (2.0, False, None)
    assert (decision.candidates[0].decode_id, decision.candidates[0].reason) == ("d0", "local_no_prefill")
    fleet.admission.progress(Progress("call-0", 32), 3.5)
    fleet.admission.finish("call-0", 0, 5.5, 11, TokenPace(0.7, 0.13))
    (decision,) = fleet.admission.decisions.find("call-0")
    assert (decision.actual_first_token_s, decision.actual_handoff_s, decision.actual_itl_s) == (0.5, 0.7, 0.13)
    assert (decision.actual_cached_tokens, decision.actual_output_tokens, decision.is_over) == (32, 11, True)
    fleet.admission.report(report(fleet.info), 6.0)
    fleet.ask(request("next"), now=6.0)
    assert fleet.plans(6.0) == ["next"]
    assert fleet.admission.decisions.find("call-0") == ()

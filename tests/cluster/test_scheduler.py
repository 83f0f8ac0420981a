"""The global scheduler's decisions, as stories: where requests go, when they wait, what is forgotten."""

from dataclasses import replace

import pytest

from cluster.scheduler.admission import Admission
from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.rules import can_pair
from core.block_hash import hash_blocks
from core.config import SchedulerConfig
from core.errors import NoReplica, Overloaded, StaleMessage
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import LinkStatus, ReplicaStatus, Report, Reserve
from core.version import PIPELINE_PROTOCOL

BLOCK = 16


def replica(name: str, role: Role, incarnation: int = 1, num_blocks: int = 1000) -> ReplicaInfo:
    layout = KVLayout(2, 2, 8, BLOCK, "float32", 1)
    same = Compatibility("m", "r", "float32", BLOCK, "h")
    return ReplicaInfo(name, role, incarnation, (f"{name}:1",), layout, same, num_blocks, 4, 512, 4096)


def report(info: ReplicaInfo, stored=(), removed=(), snapshot=False, **changes) -> Report:
    status = {
        "num_waiting": 0, "num_running": 0, "num_waiting_tokens": 0, "num_free_blocks": info.num_blocks,
        "num_kv_tokens": 0, "draining": False, "prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01, "num_steps": 0,
    } | changes  # fmt: skip
    return Report(info, 0, snapshot, ReplicaStatus(**status), tuple(stored), tuple(removed))


def reserve(name: str, tokens=tuple(range(200)), **changes) -> Reserve:
    hashes = hash_blocks(tokens, BLOCK)
    fields = {"attempt": 0, "ingress_id": "i", "max_new_tokens": 16, "timeout_s": 60.0} | changes
    return Reserve(name, num_tokens=len(tokens), block_hashes=hashes, **fields)


@pytest.fixture
def admission() -> Admission:
    config = SchedulerConfig(
        queue_limit=3, queue_timeout_s=5, reservation_ttl_s=10, replica_timeout_s=2, local_prefill_max_tokens=64
    )
    admission = Admission(config)
    for name, role in (
        ("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE),
    ):  # fmt: skip
        admission.report(report(replica(name, role), snapshot=True), 0.0)
    return admission


def plan_one(admission: Admission, request: Reserve, now: float = 0.0):
    admission.reserve(request, now)
    (plan,) = admission.dispatch(now)
    return plan


def test_equal_replicas_fill_evenly(admission):
    plans = [plan_one(admission, reserve(f"r{i}", tokens=tuple(range(i * 500, i * 500 + 200)))) for i in range(4)]
    assert sorted(p.prefill.replica_id for p in plans) == ["p0", "p0", "p1", "p1"]
    assert sorted(p.decode.replica_id for p in plans) == ["d0", "d0", "d1", "d1"]
    assert all(p.reason == "pair" for p in plans)


def test_a_cached_prefix_attracts_and_shortens_the_prediction(admission):
    tokens = tuple(range(320))
    cold = plan_one(admission, reserve("cold", tokens))
    admission.finish("cold", 0, 0.0)
    admission.report(report(replica("p1", Role.PREFILL), stored=hash_blocks(tokens[:256], BLOCK)), 0.0)
    warm = plan_one(admission, reserve("warm", tokens))
    assert warm.prefill.replica_id == "p1"
    assert warm.predicted_ttft_s == pytest.approx(cold.predicted_ttft_s - 0.256, abs=1e-3)


def test_a_prefix_cached_elsewhere_is_pulled_when_that_is_faster_than_computing_it(admission):
    """p1 has the prefix and no room for more work: p0 takes the prompt and pulls from p1."""
    tokens = tuple(range(640))
    admission.report(report(replica("p1", Role.PREFILL), stored=hash_blocks(tokens[:512], BLOCK)), 0.0)
    plan_one(admission, reserve("work", tuple(range(5000, 6500))), 0.0)
    busy = {"num_waiting_tokens": 1500}
    admission.report(report(replica("p1", Role.PREFILL), **busy), 0.0)
    admission.finish("work", 0, 0.0)
    plan = plan_one(admission, reserve("r", tokens))
    assert (plan.prefill.replica_id, plan.pull_from.replica_id) == ("p0", "p1")
    # 128 tokens at 1000 tokens/s, the blocks of 512 over the link, and the handoff's own share
    assert plan.predicted_ttft_s == pytest.approx(0.128, abs=0.02)


def test_decode_lends_what_it_generated_to_the_next_turns_prefill(admission):
    tokens = tuple(range(960))
    admission.report(report(replica("d1", Role.DECODE), stored=hash_blocks(tokens[:640], BLOCK)), 0.0)
    plan = plan_one(admission, reserve("r", tokens))
    assert (plan.reason, plan.pull_from.replica_id) == ("pair", "d1")


def test_a_prefix_is_not_pulled_when_it_saves_little_or_the_link_is_slow(admission):
    tokens = tuple(range(640))
    admission.report(report(replica("d1", Role.DECODE), stored=hash_blocks(tokens[:96], BLOCK)), 0.0)
    assert plan_one(admission, reserve("short", tokens)).pull_from is None
    admission.finish("short", 0, 0.0)
    admission.report(report(replica("p1", Role.PREFILL), stored=hash_blocks(tokens[:512], BLOCK)), 0.0)
    slow = (LinkStatus("p1", 1e4, 10**6, 5),)
    for name in ("d0", "d1"):
        admission.report(report(replica(name, Role.DECODE), links=slow), 0.0)
    local = plan_one(admission, reserve("local", tokens, placement="local"))
    assert local.prefill is None and local.pull_from is None


def test_a_short_suffix_on_decode_prefills_there(admission):
    tokens = tuple(range(320))
    admission.report(report(replica("d1", Role.DECODE), stored=hash_blocks(tokens[:288], BLOCK)), 0.0)
    plan = plan_one(admission, reserve("r", tokens))
    assert (plan.prefill, plan.decode.replica_id, plan.reason) == (None, "d1", "local_short")


def test_without_prefill_replicas_decode_prefills_alone(admission):
    for name in ("p0", "p1"):
        admission.replica_lost(name)
    plan = plan_one(admission, reserve("r"))
    assert (plan.prefill, plan.reason) == (None, "local_no_prefill")


def test_saturated_prefill_spills_to_an_idle_decode_then_waits(admission):
    for name in ("p0", "p1"):
        admission.report(report(replica(name, Role.PREFILL), num_waiting_tokens=2000), 0.0)
    assert plan_one(admission, reserve("a")).reason == "local_idle"
    assert plan_one(admission, reserve("b", tokens=tuple(range(1000, 1200)))).reason == "local_idle"
    admission.reserve(reserve("c", tokens=tuple(range(2000, 2200))), 0.0)
    assert admission.dispatch(0.0) == []
    admission.report(report(replica("p0", Role.PREFILL), num_waiting_tokens=0), 1.0)
    (plan,) = admission.dispatch(1.0)
    assert (plan.request_id, plan.prefill.replica_id, plan.queue_s) == ("c", "p0", 1.0)


def test_replicas_whose_blocks_differ_are_never_paired(admission):
    other = replace(replica("p0", Role.PREFILL).compatibility, weights_revision="new")
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        admission.report(report(replace(replica(name, role, incarnation=2), compatibility=other), snapshot=True), 0.0)
    pairs = {
        (p.prefill.replica_id, p.decode.replica_id) for i in range(6) if (p := plan_one(admission, reserve(f"r{i}")))
    }
    assert pairs == {("p0", "d0"), ("p1", "d1")}


def test_decode_without_room_is_not_chosen(admission):
    admission.report(report(replica("d0", Role.DECODE), num_free_blocks=5, num_running=1), 0.0)
    assert {plan_one(admission, reserve(f"r{i}")).decode.replica_id for i in range(3)} == {"d1"}


def test_a_replica_that_failed_the_request_is_avoided_unless_it_is_the_last(admission):
    assert plan_one(admission, reserve("r", avoid=("d0", "p0"))).decode.replica_id == "d1"
    admission.replica_lost("d1")
    assert plan_one(admission, reserve("r", avoid=("d0", "p0"), attempt=1)).decode.replica_id == "d0"


def test_a_prompt_that_prefill_cannot_hold_is_prefilled_where_it_fits(admission):
    for name in ("p0", "p1"):
        admission.report(report(replace(replica(name, Role.PREFILL), max_model_len=199)), 0.0)
    plan = plan_one(admission, reserve("r", tokens=tuple(range(200)), placement="pair"))
    assert (plan.prefill, plan.reason) == (None, "local_no_prefill")
    admission.report(report(replace(replica("p1", Role.PREFILL), max_model_len=200)), 0.0)
    assert plan_one(admission, reserve("s", tokens=tuple(range(1000, 1200)))).prefill.replica_id == "p1"


def test_a_request_that_waits_for_the_replica_it_did_not_fail_on_holds_nobody_up(admission):
    admission.report(report(replica("d1", Role.DECODE), num_running=4), 0.0)
    admission.reserve(reserve("handed back", attempt=1, avoid=("d0",)), 0.0)
    admission.reserve(reserve("next"), 0.0)
    (plan,) = admission.dispatch(0.0)
    assert (plan.request_id, plan.decode.replica_id) == ("next", "d0")
    admission.report(report(replica("d1", Role.DECODE), num_running=3), 0.1)
    (plan,) = admission.dispatch(0.1)
    assert (plan.request_id, plan.decode.replica_id) == ("handed back", "d1")


def test_draining_and_silent_replicas_get_nothing(admission):
    admission.report(report(replica("d0", Role.DECODE), draining=True), 1.9)
    admission.report(report(replica("d1", Role.DECODE)), 1.9)
    admission.report(report(replica("p1", Role.PREFILL)), 1.9)
    plan = plan_one(admission, reserve("r"), now=3.0)
    assert (plan.prefill.replica_id, plan.decode.replica_id) == ("p1", "d1")
    admission.reserve(reserve("late"), 10.0)
    assert admission.dispatch(10.0) == [], "all have been silent for too long"


def fill_both_zones(config: SchedulerConfig, *, with_near_prefill: bool) -> Admission:
    admission = Admission(config)
    zones = {"p-east": Role.PREFILL, "d-west": Role.DECODE}
    if with_near_prefill:
        zones["p-west"] = Role.PREFILL
    for name, role in zones.items():
        info = replace(replica(name, role), zone=name[2:])
        rate = 9000.0 if name == "p-east" else 1000.0
        admission.report(report(info, snapshot=True, prefill_tokens_per_s=rate), 0.0)
    return admission


@pytest.mark.parametrize(
    ("affinity", "near", "prefill", "reason"),
    [
        ("ignore", True, "p-east", "pair"),
        ("prefer", True, "p-west", "pair"),
        ("prefer", False, "p-east", "pair"),
        ("require", True, "p-west", "pair"),
        ("require", False, None, "local_no_prefill"),
    ],
)
def test_pairs_keep_to_their_zone_as_far_as_configured(affinity, near, prefill, reason):
    admission = fill_both_zones(
        SchedulerConfig(zone_affinity=affinity, local_prefill_max_tokens=0), with_near_prefill=near
    )
    plan = plan_one(admission, reserve("r"))
    assert (plan.prefill and plan.prefill.replica_id, plan.reason) == (prefill, reason)


def test_the_pair_with_the_faster_link_wins_and_small_differences_do_not_count(admission):
    rates = {("p0", "d0"): 1e4, ("p1", "d0"): 1e9, ("p0", "d1"): 1e4, ("p1", "d1"): 1.1e9}
    for decode in ("d0", "d1"):
        links = tuple(LinkStatus(p, rate, 1, 1) for (p, d), rate in rates.items() if d == decode)
        admission.report(report(replica(decode, Role.DECODE), links=links), 0.0)
    plans = [
        plan_one(admission, reserve(f"r{i}", tokens=tuple(range(i * 500, i * 500 + 20)), placement="pair"))
        for i in range(2)
    ]
    assert [p.prefill.replica_id for p in plans] == ["p1", "p1"]
    assert [p.decode.replica_id for p in plans] == ["d0", "d1"]


def test_requests_wait_a_while_for_a_decode_replica():
    admission = Admission(SchedulerConfig(replica_timeout_s=2, no_replica_timeout_s=4))
    admission.reserve(reserve("early"), 101.0)
    assert admission.dispatch(101.0) == []
    admission.report(report(replica("d0", Role.DECODE), snapshot=True), 101.5)
    (plan,) = admission.dispatch(101.5)
    assert (plan.request_id, plan.decode.replica_id) == ("early", "d0")
    admission.reserve(reserve("waits"), 101.6)
    admission.replica_lost("d0")
    assert admission.expire(105.5) == {}
    assert isinstance(admission.expire(105.7)["waits"], NoReplica)


def test_the_queue_is_bounded_and_its_waits_end(admission):
    for name in ("d0", "d1"):
        admission.report(report(replica(name, Role.DECODE), num_free_blocks=0, num_running=4), 0.0)
    for i in range(3):
        admission.reserve(reserve(f"r{i}"), 0.0)
    with pytest.raises(Overloaded):
        admission.reserve(reserve("r3"), 0.0)
    assert admission.dispatch(1.0) == []
    for name in ("d0", "d1"):
        admission.report(report(replica(name, Role.DECODE), num_free_blocks=0, num_running=4), 4.0)
    assert admission.expire(4.9) == {}
    late = admission.expire(5.0)
    assert list(late) == ["r0", "r1", "r2"] and all(isinstance(error, Overloaded) for error in late.values())
    assert admission.num_waiting == 0


def test_reservations_of_a_dead_ingress_expire_and_renewed_ones_do_not(admission):
    plan_one(admission, reserve("dead"))
    plan_one(admission, reserve("alive"))
    admission.reservations.renew(("alive", "unknown"), 9.0)
    admission.expire(10.0)
    assert len(admission.reservations) == 1
    admission.finish("alive", 0, 10.0)
    assert all(view.num_reservations == 0 for view in admission.fleet)


def test_a_new_incarnation_starts_with_an_empty_cache(admission):
    tokens = tuple(range(320))
    admission.report(report(replica("p0", Role.PREFILL), stored=hash_blocks(tokens, BLOCK)), 0.0)
    admission.report(report(replica("p0", Role.PREFILL, incarnation=2), snapshot=True), 0.1)
    assert admission.index.match(hash_blocks(tokens, BLOCK)) == {}


def test_a_finish_that_overtakes_its_reserve_leaves_nothing(admission):
    admission.finish("r", 0, 0.0)
    with pytest.raises(StaleMessage):
        admission.reserve(reserve("r"), 0.0)
    assert plan_one(admission, reserve("r", attempt=1)).attempt == 1
    admission.finish("r", 0, 0.0)
    assert len(admission.reservations) == 1


def test_the_index_matches_leading_blocks_only():
    index = PrefixIndex()
    hashes = hash_blocks(range(64), BLOCK)
    index.store("a", hashes)
    index.store("b", (hashes[0], hashes[2]))
    assert index.match(hashes) == {"a": 4, "b": 1}
    index.remove("a", hashes[1:2])
    assert index.match(hashes) == {"a": 1, "b": 1}
    index.remove_replica("a")
    index.remove_replica("b")
    assert len(index) == 0


def test_a_prompt_that_fills_an_empty_cache_to_the_last_token_is_planned(admission):
    """One token less than the cache: its last block has room for the first output token, no block beyond is needed."""
    for name in ("d0", "d1"):
        admission.replica_lost(name)
    small = replica("d2", Role.DECODE, num_blocks=4)
    admission.report(report(small, snapshot=True, num_free_blocks=4), 0.0)
    assert plan_one(admission, reserve("r", tokens=tuple(range(63)))).decode.replica_id == "d2"


def staged(info: ReplicaInfo, **changes) -> ReplicaInfo:
    return replace(info, layout=replace(info.layout, pipeline_parallel=2), **changes)


def test_only_who_knows_of_stages_fetches_from_them():
    prefill, decode = replica("p0", Role.PREFILL), replica("d0", Role.DECODE)
    old, new = (replace(decode, protocol=PIPELINE_PROTOCOL - age) for age in (1, 0))
    assert can_pair(prefill, old) and can_pair(staged(prefill), new)
    assert not can_pair(staged(prefill), old), "its plan would know of one rank"
    assert can_pair(prefill, staged(new)), "an old source serves what it is asked for"


def test_prefill_of_two_stages_holds_a_step_more():
    """512 tokens a step: of prompts of 600, two for one stage, three for two of them."""
    for stages, num_planned in ((1, 2), (2, 3)):
        admission = Admission(SchedulerConfig(queue_limit=9, local_prefill_max_tokens=0))
        prefill = replica("p0", Role.PREFILL)
        layout = replace(prefill.layout, pipeline_parallel=stages)
        for info in (replace(prefill, layout=layout), replace(replica("d0", Role.DECODE), protocol=PIPELINE_PROTOCOL)):
            admission.report(report(info, snapshot=True), 0.0)
        for number in range(4):
            tokens = tuple(range(number * 1000, number * 1000 + 600))
            admission.reserve(reserve(f"r{number}", tokens, placement="pair"), 0.0)
        assert len(admission.dispatch(0.0)) == num_planned

"""Nobody joins a batch whose tokens would then take longer than the ITL SLO."""

from dataclasses import replace

import pytest

from cluster.scheduler.site import Site
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress
from tests.cluster.scheduler_world import CONTEXT_S, SEQUENCE_S, STEP_S, World, asked_for

SLO_S = 0.02
FULL = {"num_running": 200, "num_kv_tokens": 100_000, "num_free_blocks": 20_000}  # 8 + 10 + 2 ms
LESS = {"num_running": 150, "num_kv_tokens": 75_000, "num_free_blocks": 25_000}


def full_world(itl_slo_s: float = SLO_S, num_decode: int = 1) -> World:
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=itl_slo_s))
    world.fleet(1, num_decode)
    for number in range(num_decode):
        world.report(f"d{number}", **FULL)
    return world


def test_a_request_waits_until_a_batch_is_smaller():
    world = full_world()
    assert world.plan(world.request(100)) is None
    assert world.admission.dispatch(1.0) == []
    world.report("d0", **LESS, now=1.1)
    (plan,) = world.admission.dispatch(1.1)
    assert plan.decode.replica_id == "d0"


def test_batches_grow_up_to_the_slo_and_no_further():
    slo_s = 0.012
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=slo_s))
    world.fleet(1, 1)
    num = 0
    while (plan := world.plan(world.request(200, max_new_tokens=16))) is not None:
        num += 1
        world.admission.progress(Progress(plan.request_id), 0.0)
        world.report("d0", num_running=num, num_kv_tokens=200 * num, num_free_blocks=40_000 - 13 * num)
        assert num < 100
    assert 0.95 * slo_s < STEP_S + (SEQUENCE_S + 200 * CONTEXT_S) * num < 0.98 * slo_s


@pytest.mark.parametrize("placement", ["pair", "local"])
def test_placement_makes_no_difference(placement):
    world = full_world()
    assert world.plan(world.request(100, placement=placement)) is None


def test_a_replica_without_a_batch_takes_even_what_keeps_no_slo_there():
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.0106))
    world.fleet(1, 1)
    plan = world.plan(world.request(125_000))
    assert plan is not None and world.admission.reservations.find(plan.request_id).decision.terms.itl_s > 0.0104


def test_where_no_batch_takes_anybody_one_is_asked_for(monkeypatch):
    world = full_world(num_decode=12)
    for number in range(20):
        world.admission.reserve(world.request(3000 - number), 0.0)
    asked = asked_for(world, monkeypatch)
    assert world.admission.dispatch(0.1) == []
    assert len(asked) == 1


def test_of_many_replicas_the_one_whose_batch_is_smaller_is_found():
    world = full_world(num_decode=12)
    world.report("d7", **LESS)
    assert world.plan(world.request(100)).decode.replica_id == "d7"


@pytest.mark.parametrize(("itl_slo_s", "joins"), [(1.3 * STEP_S, False), (0.9 * STEP_S, True)])
def test_where_no_batch_can_keep_the_slo_it_is_no_limit(itl_slo_s, joins):
    world = full_world(itl_slo_s=itl_slo_s)
    assert (world.plan(world.request(100)) is not None) is joins


def test_a_long_context_gets_its_turn_though_shorter_ones_would_always_fit():
    """A batch of 60 short ones at an SLO of 12 ms, one comes for each that ends; 60,000 tokens more take 1.2 ms."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.012, queue_timeout_s=3600.0))
    world.fleet(1, 1)
    running: list[str] = []

    def told(now: float) -> None:
        num = len(running)
        world.report("d0", num_running=num, num_kv_tokens=200 * num, num_free_blocks=40_000 - 13 * num, now=now)

    def join(now: float) -> list[str]:
        names = [plan.request_id for plan in world.admission.dispatch(now)]
        for name in names:
            world.admission.progress(Progress(name), now)
        running.extend(names)
        told(now)
        return names

    for _ in range(60):
        world.admission.reserve(world.request(200), 0.0)
        join(0.0)
    long = world.request(60_000)
    world.admission.reserve(long, 1.0)
    now = 1.0
    while long.request_id not in join(now):
        now += 0.1
        assert now < 10.0
        world.admission.finish(running.pop(0), 0, now, 64)
        told(now)
        world.admission.reserve(world.request(200, timeout_s=3600.0), now)
    assert now > 3.0, "until its token was due, others overtook it"


def test_who_is_in_the_middle_of_an_answer_joins_all_the_same():
    world = full_world()
    assert world.plan(replace(world.request(100), attempt=1, num_shown=1)) is not None


def test_an_attempt_that_showed_nothing_is_nobody_in_the_middle_of_an_answer():
    """A request whose replicas fail again and again joins no full batch, and goes by its tenant's share."""
    world = full_world()
    assert world.plan(replace(world.request(100), attempt=3)) is None
    world = full_world()
    world.admission._share.taken("before", "other", 10**6, 0)
    again = replace(world.request(100, tenant="other", timeout_s=3600.0), attempt=3)
    world.admission.reserve(again, 0.0)
    mine, its_next = world.request(100), world.request(100, tenant="other")
    world.admission.reserve(mine, 0.1)
    world.admission.reserve(its_next, 0.0)
    world.report("d0", **LESS, now=1.0)
    order = [plan.request_id for plan in world.admission.dispatch(1.0)]
    assert order == [mine.request_id, again.request_id, its_next.request_id]


def test_batch_work_makes_room_where_a_batch_is_full():
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=SLO_S))
    world.fleet(1, 1)
    batch = world.plan(world.request(64, slo_class="batch"))
    world.admission.progress(Progress(batch.request_id), 0.1)
    world.report("d0", **LESS)
    assert world.plan(world.request(100), 0.2) is not None
    assert world.admission.take_yields() == []
    world.report("d0", **FULL)
    assert world.plan(world.request(100), 0.3) is None
    assert [one.request_id for one in world.admission.take_yields()] == [batch.request_id]


def test_one_long_prompt_does_not_close_a_batch_for_long():
    """Ten seconds of a prompt beside a batch of steps of 10 ms: soon after its end the batch takes others again."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.1))
    world.add("d0", Role.DECODE)
    view = world.admission.fleet.get("d0")
    world.report("d0", num_running=2, num_kv_tokens=1000)
    site: Site = world.admission.policy._sites.of(view)
    site.stalls.add(10.0, 20, 10.0)
    assert not site.keeps_itl(0.1, 100, 10.0)
    assert site.keeps_itl(0.1, 100, 11.5)


def test_who_is_in_the_middle_of_an_answer_goes_before_all_that_wait_for_a_smaller_batch():
    """Of whichever tenant, however long, and though more wait than are looked at in a round."""
    world = full_world()
    world.admission._share.taken("before", "other", 10**6, 0)
    for number in range(20):
        world.admission.reserve(world.request(100 + number, tenant="many", priority=1), 0.0)
    assert world.admission.dispatch(0.1) == []
    resumed = replace(world.request(4000, tenant="other"), attempt=1, num_shown=1)
    world.admission.reserve(resumed, 0.2)
    (plan,) = world.admission.dispatch(0.2)
    assert plan.request_id == resumed.request_id

"""Who finds no room holds up nobody who finds some, and is not overtaken for good."""

import pytest

from core.config import SchedulerConfig
from core.errors import Overloaded
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress
from tests.cluster.scheduler_world import World, asked_for

LONG = 100_000


def crowded(num_replicas: int = 3, num_free_blocks: int = 7000) -> World:
    """Decode replicas whose batches leave room for 48,000 tokens (a tenth of the blocks stays free), not for LONG."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, queue_timeout_s=60.0))
    for number in range(num_replicas):
        world.add(f"d{number}", Role.DECODE)
        world.report(f"d{number}", num_free_blocks=num_free_blocks, num_running=8, num_kv_tokens=400_000)
    return world


def planned(world: World, now: float) -> list[tuple[str, str]]:
    return [(plan.request_id, plan.decode.replica_id) for plan in world.admission.dispatch(now)]


def test_shorter_ones_go_where_there_is_room_for_them_whoever_waits_before_them():
    world = crowded()
    world.admission.reserve(world.request(LONG), 0.0)
    for _ in range(3):
        world.admission.reserve(world.request(64, tenant="other"), 0.0)
    assert [name for name, _ in planned(world, 0.0)] == ["r2", "r3", "r4"]
    assert world.admission.num_waiting == 1


def test_one_that_waits_beyond_its_due_time_has_a_replica_kept_for_it():
    """It is due after 2 s. From then on the others go elsewhere, though its replica is the least loaded one, and it
    goes when that has emptied.
    """
    world = crowded()
    world.report("d1", num_free_blocks=7100, num_running=1, num_kv_tokens=1000)
    world.admission.reserve(world.request(LONG), 0.0)
    world.admission.reserve(world.request(64), 1.0)
    assert planned(world, 1.0) == [("r2", "d1")]
    assert planned(world, 2.5) == []
    for number in range(2):
        world.admission.reserve(world.request(64), 3.0)
        ((_, decode),) = planned(world, 3.0 + number / 100)
        assert decode in ("d0", "d2")
    world.report("d1", num_free_blocks=40_000, num_running=0, num_kv_tokens=0, now=4.0)
    world.admission.finish("r2", 0, 4.0, 1)
    assert planned(world, 4.0) == [("r1", "d1")]


def test_nobody_is_refused_for_one_that_waits_for_more_room_than_the_others_need():
    """It has waited for a minute; by what was given to those who wait, another one would wait as long."""
    world = crowded()
    world.admission.reserve(world.request(LONG, timeout_s=3600.0), 0.0)
    for tenth in range(600):
        assert planned(world, tenth / 10) == []
    assert world.admission.num_waiting == 1
    for _ in range(4):
        short = world.request(200, timeout_s=5.0)
        world.admission.reserve(short, 60.0)
        assert [name for name, _ in planned(world, 60.0)] == [short.request_id]


def test_who_is_as_long_as_one_that_found_no_room_is_still_refused():
    world = crowded(num_free_blocks=0)
    world.admission.reserve(world.request(LONG, timeout_s=3600.0), 0.0)
    for tenth in range(600):
        assert planned(world, tenth / 10) == []
    with pytest.raises(Overloaded, match="is foreseen, 5 s are allowed"):
        world.admission.reserve(world.request(LONG, timeout_s=5.0), 60.0)


def test_batch_work_is_refused_though_there_were_room_as_it_goes_after_who_waits():
    world = crowded()
    world.admission.reserve(world.request(LONG, timeout_s=3600.0), 0.0)
    for tenth in range(600):
        assert planned(world, tenth / 10) == []
    with pytest.raises(Overloaded, match="is foreseen, 5 s are allowed"):
        world.admission.reserve(world.request(200, timeout_s=5.0, slo_class="batch"), 60.0)


def test_no_replica_is_kept_for_one_that_waits_for_something_else():
    """Prefill is busy; decode has room."""
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    world.fleet(1, 2)
    for _ in range(2):
        assert world.plan(world.request(4000, placement="pair"))
    world.admission.reserve(world.request(4000, placement="pair"), 0.0)
    for number in range(4):
        world.admission.reserve(world.request(64 + number, placement="local"), 5.0)
    assert {decode for _, decode in planned(world, 5.0)} == {"d0", "d1"}


def test_a_client_that_insists_on_busy_prefill_replicas_holds_up_nobody():
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    world.fleet(1, 2)
    while world.plan(world.request(4000, placement="pair")):
        pass
    waiting = world.admission.num_waiting
    world.admission.reserve(world.request(200), 0.1)
    assert len(planned(world, 0.1)) == 1
    assert world.admission.num_waiting == waiting


@pytest.mark.parametrize("num_waiting", [20, 2000])
def test_a_round_asks_for_few_of_those_who_find_no_room(num_waiting, monkeypatch):
    world = crowded(num_free_blocks=0)
    world.admission._config = world.admission._config.model_copy(update={"queue_limit": 10_000})
    world.admission._refusals._queue_limit = 10_000
    for number in range(num_waiting):
        world.admission.reserve(world.request(4000 - number), 0.0)
    asked = asked_for(world, monkeypatch)
    assert planned(world, 0.1) == []
    assert len(asked) == 8


@pytest.mark.parametrize("is_alone", [True, False])
def test_batch_work_overtakes_nobody(is_alone):
    world = World(SchedulerConfig(replica_timeout_s=1e9, max_batch_kv_usage=0.9))
    world.add("d0", Role.DECODE)
    world.report("d0", num_free_blocks=7500, num_running=1, num_kv_tokens=1000)
    if not is_alone:
        world.admission.reserve(world.request(LONG), 0.0)
    batch = world.request(200, slo_class="batch")
    world.admission.reserve(batch, 0.0)
    assert [name for name, _ in planned(world, 0.1)] == ([batch.request_id] if is_alone else [])


def test_batch_work_makes_room_for_a_long_prompt_though_short_ones_would_find_some():
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    world.add("d0", Role.DECODE)
    batch = []
    for number in range(6):  # short prompts, long answers
        batch.append(world.plan(world.request(64, slo_class="batch"), number / 10).request_id)
        world.admission.progress(Progress(batch[-1]), number / 10)
        held = {"num_free_blocks": 40_000 - 5500 * len(batch), "num_kv_tokens": LONG * len(batch)}
        world.report("d0", num_running=len(batch), now=number / 10, **held)
    assert world.plan(world.request(LONG), 1.0) is None
    assert [one.request_id for one in world.admission.take_yields()] == [batch[-1]]
    assert world.admission.dispatch(2.0) == [] and world.admission.take_yields() == []
    world.admission.dispatch(3.1)  # what it was told may have been lost: another one is asked
    assert [one.request_id for one in world.admission.take_yields()] == [batch[-2]]

"""Replicas come and go for months: nothing stays of those that are gone, whatever ends or is reported afterwards."""

from dataclasses import replace

import pytest

from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress, Report
from tests.cluster.scheduler_world import World, status


@pytest.fixture
def world() -> World:
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    world.add("p0", Role.PREFILL)
    return world


def test_requests_that_end_after_their_replica_bring_nothing_of_it_back(world):
    learned, sites = world.admission.policy.learned, world.admission.policy._sites
    for number in range(3):
        name = f"gone{number}"
        world.add(name, Role.DECODE)
        local, pair = (world.plan(world.request(64, placement=placement)) for placement in ("local", "pair"))
        assert (local.decode.replica_id, pair.decode.replica_id) == (name, name)
        world.admission.replica_lost(name)
        world.admission.progress(Progress(local.request_id), 0.5)
        world.admission.finish(local.request_id, 0, 0.6, 10)
        world.admission.finish(pair.request_id, 0, 0.7, 10)
    for known in (sites._sites, learned.costs._costs, learned.costs._of):
        assert list(known) == ["p0"]


def test_an_earlier_incarnations_requests_leave_the_later_one_as_it_is(world):
    made = world.add("d0", Role.DECODE)
    plan = world.plan(world.request(64, placement="local"))
    again = status(num_free_blocks=123)
    world.admission.report(Report(replace(made, incarnation=2), 0, True, again, (), ()), 1.0)
    world.admission.finish(plan.request_id, 0, 1.1)
    site = world.admission.policy._sites.find("d0")
    assert site.view is world.admission.fleet.get("d0") and site.info.incarnation == 2

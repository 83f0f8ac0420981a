"""Prompts that are computed or about to be draw those that begin alike, until reports tell of them."""

import random

from cluster.scheduler.coming_prefixes import ComingPrefixes
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress, Report
from tests.cluster.scheduler_world import BLOCK, World, blocks_of, info, status

DOCUMENT = range(20_000)


def question(world: World, number: int):
    return world.request(20_100, tokens=(*DOCUMENT, *range(10**6 + 1000 * number, 10**6 + 1000 * number + 100)))


def test_a_burst_about_one_document_is_computed_once():
    """1.2 s of a replica's time each, were they spread."""
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    world.fleet(4, 2)
    plans = [world.plan(question(world, number), 0.01 * number) for number in range(8)]
    plans = [plan for plan in plans if plan]
    assert len(plans) >= 4
    assert len({(plan.prefill or plan.decode).replica_id for plan in plans}) == 1
    decided = [world.admission.reservations.find(plan.request_id).decision for plan in plans]
    assert [one.num_uncached_tokens for one in decided] == [20_100] + [100] * (len(plans) - 1)


def test_what_its_own_report_tells_of_is_forgotten_and_what_was_given_up_at_once():
    world = World(SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0))
    world.fleet(2, 1)
    first = world.plan(question(world, 0))
    coming = world.admission.policy._coming
    assert len(coming) == 1
    world.admission.progress(Progress(first.request_id), 1.0)
    assert len(coming) == 1, "the index does not know yet"
    world.report(first.prefill.replica_id, stored=blocks_of(DOCUMENT), now=1.1)
    assert len(coming) == 0
    second = world.plan(question(world, 1), 2.0)
    world.admission.finish(second.request_id, 0, 2.1)
    assert len(coming) == 0
    third = world.plan(question(world, 2), 3.0)
    world.admission.replica_lost((third.prefill or third.decode).replica_id)
    assert len(coming) == 0


def test_depths_are_those_of_comparing_with_each():
    rng, coming, under_way = random.Random(3), ComingPrefixes(), {}
    for step in range(400):
        name = f"r{rng.randrange(40)}"
        if rng.random() < 0.4:
            coming.end(name)
            under_way.pop(name, None)
            continue
        tokens = [rng.randrange(2) for _ in range(BLOCK * rng.randrange(1, 12))]
        hashes = blocks_of([token for token in tokens[::BLOCK] for _ in range(BLOCK)])
        depth = rng.randrange(len(hashes))
        coming.begin(name, f"p{step % 5}", hashes, depth)
        under_way[name] = f"p{step % 5}", hashes, depth
        asked = blocks_of([token for token in (rng.randrange(2) for _ in range(8)) for _ in range(BLOCK)])
        expected: dict[str, int] = {}
        for replica_id, others, num_there in under_way.values():
            common = next((i for i, pair in enumerate(zip(others, asked, strict=False)) if pair[0] != pair[1]), None)
            common = min(len(others), len(asked)) if common is None else common
            if common > num_there:
                expected[replica_id] = max(common, expected.get(replica_id, 0))
        assert coming.depths(asked) == expected
    assert len(coming) == len(under_way)


def test_a_report_of_an_earlier_attempts_replica_ends_no_later_attempt():
    coming, hashes = ComingPrefixes(), blocks_of(range(BLOCK * 4))
    coming.begin("r", "p0", hashes, 0)
    coming.computed("r")
    coming.begin("r", "p1", hashes, 0)  # decode was lost behind the first token
    coming.reported("p0")
    assert coming.depths(hashes) == {"p1": 4}
    coming.computed("r")
    coming.reported("p1")
    assert not len(coming)


def test_of_replicas_that_compute_the_same_who_began_first_is_taken():
    """Five documents, each computed by ten replicas alike: no set's order decides."""
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    everyone = [f"d{number}" for number in range(60)]
    for name in everyone:
        measured = status(prefill_tokens_per_s=20_000.0, decode_step_s=0.01)
        world.admission.report(Report(info(name, Role.DECODE), 0, True, measured, (), ()), 0.0)
    for number in range(5):
        document = range(10**7 * (number + 1), 10**7 * (number + 1) + 20_000)
        names = [f"d{10 * number + i}" for i in range(10)]
        for name in names:
            avoid = tuple(other for other in everyone if other != name)
            plan = world.plan(world.request(20_000, tokens=document, placement="local", avoid=avoid))
            assert plan.decode.replica_id == name
        follower = world.request(20_500, tokens=(*document, *range(500)))
        assert world.decide(follower).decode.info.replica_id == names[0]

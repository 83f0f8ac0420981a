"""How long requests become, and whether a decode replica can hold them until then."""

import random

import pytest

from cluster.scheduler.expected_length import FIRST_GUESS, ExpectedLength
from cluster.scheduler.headroom import most_growth
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress
from tests.cluster.scheduler_world import BLOCK, World


def test_the_expected_length_is_the_tenants_mean_and_never_beyond_the_worst_case():
    lengths = ExpectedLength()
    assert lengths.of("g", "chat", 10_000) == FIRST_GUESS
    assert lengths.of("g", "chat", 30) == 30
    for _ in range(100):
        lengths.ended("g", "chat", 100)
        lengths.ended("g", "essays", 900)
    assert lengths.of("g", "chat", 10_000) == pytest.approx(100, rel=0.07)
    assert lengths.of("g", "essays", 10_000) == pytest.approx(900, rel=0.05)
    assert lengths.of("g", "essays", 200) == 200, "none is taken for longer than this one may become"
    assert lengths.of("other model", "chat", 10_000) == FIRST_GUESS


def test_a_tenant_whose_answers_become_short_is_believed():
    lengths = ExpectedLength()
    for _ in range(300):
        lengths.ended("g", "t", 800)
    for _ in range(300):
        lengths.ended("g", "t", 50)
    assert lengths.of("g", "t", 10_000) == pytest.approx(50, rel=0.1)


def stepped_growth(batch: list[tuple[int, int]]) -> int:
    """A token at a time: what the batch needs at most beyond what it holds now."""
    remaining = [r for r, _ in batch]
    held = [h for _, h in batch]
    start = most = sum(held)
    for step in range(1, max(remaining) + 1):
        now = sum(h + step for r, h in zip(remaining, held, strict=True) if r >= step)
        most = max(most, now)
    return most - start


def test_the_most_a_batch_grows_is_what_stepping_it_finds():
    rng = random.Random(0)
    for _ in range(300):
        batch = [(rng.randint(1, 60), rng.randint(1, 100)) for _ in range(rng.randint(1, 8))]
        assert most_growth(batch) == stepped_growth(batch)
    assert most_growth([]) == 0


def world_with_free_blocks(num_free: int, num_running: int = 1) -> World:
    world = World(SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0, max_decode_kv_usage=0.9))
    world.fleet(1, 0)
    world.add("d0", Role.DECODE, num_blocks=1000)
    world.report("d0", num_running=num_running, num_free_blocks=num_free)
    return world


def test_room_is_asked_for_through_the_expected_length():
    """A hundred of 1,000 blocks are the watermark's. 200 blocks hold 1,600 tokens and 1,600 more; 199 do not."""
    for num_free, is_placed in ((301 + 1, True), (299, False)):
        world = world_with_free_blocks(num_free)
        for _ in range(256):
            world.admission.policy.learned.lengths.ended("", "essays", 1600)
        request = world.request(1600, max_new_tokens=5000, tenant="essays")
        assert (world.decide(request) is not None) == is_placed
        assert world.decide(world.request(1600, max_new_tokens=16)) is not None, (
            "the worst case bounds what is expected"
        )


def test_requests_on_their_way_count_with_all_that_they_will_generate():
    """Each takes 100 blocks now and 100 later; of 700 above the watermark the fourth finds less than 200 left."""
    world = world_with_free_blocks(800)
    plans = [world.plan(world.request(1600, max_new_tokens=1600)) for _ in range(2)]
    assert all(plans)
    for _ in range(256):
        world.admission.policy.learned.lengths.ended("", "", 1600)
    assert world.plan(world.request(1600, max_new_tokens=1600)) is not None
    assert world.decide(world.request(1600, max_new_tokens=1600)) is None
    world.admission.finish(plans[0].request_id, 0, 1.0)
    assert world.decide(world.request(1600, max_new_tokens=1600)) is not None


def test_those_about_to_end_make_room_for_one_that_grows():
    """The new one needs 200 blocks in the end. 150 are free, and 100 more when the first one ends, in 10 tokens."""
    world = world_with_free_blocks(1000)
    first = world.plan(world.request(1584, max_new_tokens=110))
    world.admission.progress(Progress(first.request_id), 0.0)
    held = 1584 // BLOCK + 7
    world.report("d0", num_running=1, num_free_blocks=100 + 150, num_kv_tokens=1584 + 100)
    request = world.request(1600, max_new_tokens=1584)
    for _ in range(256):
        world.admission.policy.learned.lengths.ended("", "", 1584)
    soon = world.decide(request, now=100 * 0.0082)
    assert soon is not None and held == 106
    world.admission.policy.learned.lengths.ended("", "", 1584)
    assert world.decide(world.request(2400, max_new_tokens=1584), now=100 * 0.0082) is None, "150 free, 150 at once"


def test_an_empty_replica_takes_what_it_can_hold_at_all():
    world = world_with_free_blocks(1000, num_running=0)
    assert world.decide(world.request(15_990, max_new_tokens=9)) is not None
    assert world.decide(world.request(16_000, max_new_tokens=9)) is None

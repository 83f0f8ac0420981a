"""What links are taken to cost: by odd samples, by none, by what others took, and after replicas have gone."""

import random
from math import inf, nan

import pytest

from cluster.scheduler.known_links import KnownLinks
from cluster.scheduler.link_book import HOPE, LEAST_FACTOR, LinkBook
from cluster.scheduler.link_end import GUESSED
from cluster.scheduler.replica_view import ReplicaView
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import LinkStatus
from tests.cluster.scheduler_world import TOKEN_BYTES, World, decode_sample, info, status

MiB = 2**20


def views_of(*names: str, **changes) -> dict[str, ReplicaView]:
    return {name: ReplicaView(info(name, Role.DECODE, **changes), status(), 0.0) for name in names}


def test_a_link_without_a_cost_per_byte_is_as_fast_as_any_may_be_and_no_faster():
    world = World()
    world.add("p", Role.PREFILL)
    world.add("d", Role.DECODE)
    shrinking = [("p", num_bytes, 0.001 - num_bytes * 1e-9) for num_bytes in (10, 1000, 100_000, 1000, 10)] * 8
    links = (LinkStatus("p", 1e6, 1000, 40),)
    for _ in range(3):
        world.report("d", transfers=shrinking, links=links)
    cost = world.admission.policy.learned.links.cost(world.admission.fleet.get("p"), world.admission.fleet.get("d"))
    assert cost.byte_s == GUESSED.byte_s / 16
    assert world.admission.policy.learned.links.fastest.byte_s == GUESSED.byte_s / 16


@pytest.mark.parametrize("bytes_per_s", [1e18, inf])
def test_a_report_of_an_absurdly_fast_link_is_believed_as_little(bytes_per_s):
    book, views = LinkBook(), views_of("p", "d", "beside")
    views["d"].hear(views["d"].info, status(links=(LinkStatus("p", bytes_per_s, 1, 1),)), 0.0)
    for view in views.values():
        book.heard(view, [])
    assert book.cost(views["p"], views["d"]).byte_s == book.fastest.byte_s == LEAST_FACTOR * GUESSED.byte_s


def test_times_that_none_can_take_are_left_out():
    world = World()
    world.fleet(1, 2)
    learned, fleet = world.admission.policy.learned, world.admission.fleet
    world.report("d0")
    costs, guess = learned.costs.of(fleet.get("d0")), learned.links.cost(fleet.get("p0"), fleet.get("d0"))
    num_tokens, num_pairs, num_decoding, num_kv_tokens, _ = decode_sample(4, 1000)
    for seconds in (nan, inf, -inf, -1.0, 0.0):
        steps = [(100, 5050, 0, 0, seconds), (num_tokens, num_pairs, num_decoding, num_kv_tokens, seconds)]
        for _ in range(8):
            world.report("d0", steps=steps, transfers=[("p0", MiB, seconds)])
    assert learned.costs.of(fleet.get("d0")) == costs
    assert learned.links.cost(fleet.get("p0"), fleet.get("d0")) == guess
    world.report("d0", steps=[decode_sample(4, 1000)], transfers=[("p0", MiB, 0.01)])
    assert learned.links.cost(fleet.get("p0"), fleet.get("d0")) != guess


def test_behind_one_slow_port_the_others_are_still_tried():
    """To d0 a prompt's 2 GB take 2.1 s, elsewhere 0.05 s; the fleet is idle whenever a request comes."""
    world = World(SchedulerConfig(replica_timeout_s=1e9))
    for number in range(4):
        world.add(f"p{number}", Role.PREFILL, port_bytes_per_s=50e9)
        world.add(f"d{number}", Role.DECODE, port_bytes_per_s=50e9)
    destinations = []
    for number in range(40):
        now = 4.0 * number
        for name in world.admission.fleet.by_id:
            world.report(name, now=now)
        plan = world.plan(world.request(16_000, placement="pair"), now)
        name = plan.decode.replica_id
        destinations.append(name)
        taken_s = 2.1 if name == "d0" else 0.05
        world.report(name, transfers=[(plan.prefill.replica_id, 16_000 * TOKEN_BYTES, taken_s)], now=now + 3)
        world.admission.finish(plan.request_id, 0, now + 3, 10)
    assert 1 <= destinations.count("d0") <= 4, "once from each"
    assert "d0" not in destinations[8:]


def test_what_was_never_tried_is_hoped_to_be_better_than_what_was():
    book, views = LinkBook(), views_of("p0", "p1", "d0", "d1", port_bytes_per_s=50e9)
    for view in views.values():
        book.heard(view, [])
    for num_bytes in (MiB, 64 * MiB, 256 * MiB) * 20:
        book.heard(views["d0"], [("p0", num_bytes, 0.001 + num_bytes / 1e9)])
    found = book.cost(views["p0"], views["d0"])
    for source, destination in (("p0", "d1"), ("p1", "d0"), ("p1", "d1")):
        cost = book.cost(views[source], views[destination])
        assert cost.byte_s == pytest.approx(HOPE * found.byte_s, rel=0.05)
        assert cost.byte_s >= book.fastest.byte_s and cost.latency_s >= book.fastest.latency_s


def test_nothing_stays_of_links_whose_ends_are_gone():
    book, views = LinkBook(), views_of("stays")
    for number in range(5):
        gone = views_of(f"gone{number}")[f"gone{number}"]
        book.heard(views["stays"], [])
        book.heard(gone, [("stays", MiB, 0.01)])
        book.heard(views["stays"], [(gone.info.replica_id, MiB, 0.01)])
        assert len(book._known) == 2
        book.lost(gone.info.replica_id)
        book.heard(views["stays"], [(gone.info.replica_id, MiB, 0.01)])
    assert not len(book._known) and not book._known._ways_from and not book._known._least_from
    assert list(book._ends) == list(book._first_on.values()) == ["stays"]


def test_a_replica_that_comes_again_on_another_host_leaves_the_first():
    book = LinkBook()
    for host in ("x", "y"):
        book.heard(views_of("a", rank_addresses=(f"{host}:1",))["a"], [])
    assert book._first_on == {"y": "a"}
    book.lost("a")
    assert not book._first_on


@pytest.mark.parametrize("seed", range(3))
def test_the_least_of_a_sources_ways_is_that_of_all_that_are_known(seed):
    """At most 12 of 30 pairs, the last heard of."""
    rng, links = random.Random(seed), KnownLinks(most_pairs=12)
    known: dict[tuple[str, str], tuple[float, float]] = {}  # the last heard of comes last
    for _ in range(2000):
        pair = f"p{rng.randrange(5)}", f"d{rng.randrange(6)}"
        if rng.random() < 0.02:
            gone = rng.choice(pair)
            links.lost(gone)
            known = {pair: cost for pair, cost in known.items() if gone not in pair}
        else:
            cost = links.add(*pair, rng.randrange(1, 10**8), rng.random() + 1e-3, GUESSED, 1e-11)
            known.pop(pair, None)
            known[pair] = cost
            if len(known) > 12:
                del known[next(iter(known))]
        asked = f"p{rng.randrange(5)}"
        ways = [cost for (source, _), cost in known.items() if source == asked]
        assert links.least_from(asked) == (tuple(map(min, zip(*ways, strict=True))) if ways else None)
        assert links.cost(*pair) == known.get(pair)
    assert len(links) == len(known)

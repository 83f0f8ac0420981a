"""Weighing a few replicas loses next to nothing against weighing all pairs, and takes up what changes."""

import random
from dataclasses import replace

import pytest

from cluster.scheduler.decision import DecisionMaker
from cluster.scheduler.policy import Choices
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress, Report
from tests.cluster.scheduler_world import BLOCK, World, blocks_of, chunk_sample, decode_sample, info, status, steps_of

NUM_REPLICAS = 60  # of each role


class Twice:
    """The same fleet and events for the production policy and for one that weighs everything."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.config = SchedulerConfig(
            replica_timeout_s=1e9, itl_slo_s=0.05, zone_affinity=rng.choice(("ignore", "prefer"))
        )
        self.world = World(self.config)
        self.all = DecisionMaker(self.config, exhaustive=True)
        zones, speeds = rng.choice(([""], ["x", "y"])), rng.choice(([1.0], [1.0, 2.0], [1.0, 1.1, 1.3]))
        self.sessions = [(range(10**6 * n, 10**6 * n + 8000), rng.randrange(20, 480)) for n in range(40)]
        for number in range(NUM_REPLICAS):
            for role in Role:
                self.add(f"{role.value}{number}", role, rng.choice(zones), rng.choice(speeds))

    def add(self, name: str, role: Role, zone: str, slow: float) -> None:
        rng = self.rng
        load = {"num_waiting": rng.randrange(3)} if role is Role.PREFILL else {"num_running": rng.randrange(120)}
        if role is Role.PREFILL:
            load["num_waiting_tokens"] = load["num_waiting"] * rng.randrange(100, 1500)
        else:
            load |= {"num_kv_tokens": load["num_running"] * 1500, "num_free_blocks": rng.randrange(2000, 40_000)}
        chunks = [chunk_sample(rng.randrange(16, 2048), rng.randrange(16_000), slow) for _ in range(4)]
        decodes = [decode_sample(batch := rng.randrange(1, 120), batch * 1500, slow) for _ in range(4)]
        sources = rng.sample(range(NUM_REPLICAS), 5)
        transfers = []
        if role is Role.DECODE:
            rates = [(f"prefill{s}", rng.choice((5e9, 10e9, 20e9))) for s in sources]
            transfers = [(s, size, 0.001 + size / rate) for s, rate in rates for size in (2**20, 2**26)] * 4
        stored = [key for tokens, depth in rng.sample(self.sessions, 3) for key in blocks_of(tokens, BLOCK * depth)]
        made = replace(info(name, role), zone=zone)
        self.tell(Report(made, 0, True, status(**load), tuple(dict.fromkeys(stored)), ()))
        for _ in range(4):
            steps, moved = (*chunks, *decodes), tuple(transfers)
            view = self.world.admission.fleet.get(name)
            self.tell(Report(made, 1, False, view.status, (), (), b"", steps, moved))

    def tell(self, report: Report) -> None:
        self.world.admission.report(report, 0.0)
        self.all.reported(self.world.admission.fleet.get(report.info.replica_id), report, 0.0)

    def request(self):
        rng = self.rng
        if rng.random() < 0.6:
            tokens, depth = rng.choice(self.sessions)
            return self.world.request(BLOCK * depth + 40, tokens=tokens[: BLOCK * depth + 40])
        return self.world.request(rng.choice((60, 1000, 8000)))

    def both(self, request):
        admission = self.world.admission
        cached = admission.index.match(request.block_hashes[: (request.num_tokens - 1) // BLOCK])
        pools = [admission.fleet.in_generation(role, "", 0.0) for role in Role]
        choices = Choices(*pools, cached, 0.0, admission.fleet.by_id)
        return admission.policy.decide(request, choices), self.all.decide(request, choices)


def predicted_s(seed: int) -> tuple[float, float]:
    """Of a short list's choices and of the full scan's: 60 x 60 pairs, 60 requests, each in the wake of the others."""
    fleet = Twice(seed)
    of_few = of_all = 0.0
    for _ in range(60):
        request = fleet.request()
        few, everything = fleet.both(request)
        assert few.crosses_zones == everything.crosses_zones
        assert max(few.terms.itl_s, everything.terms.itl_s) <= fleet.config.itl_slo_s
        of_few += few.predicted_ttft_s
        of_all += everything.predicted_ttft_s
        fleet.world.plan(request)
        fleet.all.booked(fleet.world.admission.reservations.find(request.request_id), 0.0)
    return of_few, of_all


def test_short_lists_lose_less_than_one_percent_of_predicted_ttft():
    """Random loads, speeds, links, zones and caches, in six fleets; none of them loses three percent."""
    sums = [predicted_s(seed) for seed in range(6)]
    of_few, of_all = (sum(part) for part in zip(*sums, strict=True))
    assert of_few < 1.01 * of_all
    assert all(few < 1.03 * everything for few, everything in sums)


def cost_s(seed: int, itl_slo_s: float, after_s: float = 0.3) -> tuple[float, float]:
    """Of decode replicas that prefill by themselves, most prompts new; first tokens come `after_s`."""
    rng, config = random.Random(seed), SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=itl_slo_s)
    world, everyone = World(config), DecisionMaker(config, exhaustive=True)

    def tell(name: str, now: float) -> None:
        num_running = rng.randrange(60)
        load = status(num_running=num_running, num_kv_tokens=1500 * num_running, num_free_blocks=30_000)
        report = Report(world.admission.fleet.get(name).info, 0, False, load, (), ())
        world.admission.report(report, now)
        everyone.reported(world.admission.fleet.get(name), report, now)

    for number in range(30):
        world.add(f"d{number}", Role.DECODE)
        view = world.admission.fleet.get(f"d{number}")
        for _ in range(20):
            everyone.reported(view, Report(view.info, 0, False, view.status, (), (), b"", steps_of()), 0.0)
        tell(f"d{number}", 0.0)
    few_s, all_s, under_way = 0.0, 0.0, []
    for number in range(300):
        now = 0.02 * number
        request = world.request(rng.choice((200, 1000, 4000, 12_000)))
        cached = world.admission.index.match(request.block_hashes)
        choices = Choices((), world.admission.fleet.in_generation(Role.DECODE, "", now), cached, now, {})
        few, best = world.admission.policy.decide(request, choices), everyone.decide(request, choices)
        if few and best:
            few_s, all_s = few_s + few.terms.cost_s, all_s + best.terms.cost_s
        if (plan := world.plan(request, now)) is not None:
            everyone.booked(world.admission.reservations.find(plan.request_id), now)
            under_way.append((now + after_s, plan.request_id))
        for at, request_id in [one for one in under_way if one[0] <= now]:
            under_way.remove((at, request_id))
            reservation = world.admission.reservations.find(request_id)
            world.admission.progress(Progress(request_id), now)
            everyone.first_token(reservation, None, now)
        tell(f"d{rng.randrange(30)}", now)
    return few_s, all_s


@pytest.mark.parametrize(("itl_slo_s", "most"), [(0.03, 1.005), (0.02, 1.015)])
def test_short_lists_lose_little_of_the_cost_where_decode_prefills(itl_slo_s, most):
    """A load whose prompts take most of the time: near the SLO, and beyond it whatever is chosen."""
    sums = [cost_s(seed, itl_slo_s) for seed in range(4)]
    few_s, all_s = (sum(part) for part in zip(*sums, strict=True))
    assert all_s < few_s < most * all_s


def test_short_lists_lose_no_more_where_first_tokens_come_ten_times_later_than_foreseen():
    sums = [cost_s(seed, 0.03, after_s=3.0) for seed in range(4)]
    few_s, all_s = (sum(part) for part in zip(*sums, strict=True))
    assert few_s < 1.005 * all_s


def test_a_large_pool_is_kept_in_order_as_loads_change():
    world = World(SchedulerConfig(replica_timeout_s=2.0, local_prefill_max_tokens=0))
    world.fleet(40, 20)
    assert {world.plan(world.request(500)).prefill.replica_id for _ in range(40)} == {f"p{n}" for n in range(40)}
    world.report("p7", num_waiting_tokens=0, num_waiting=0)
    for plan in [world.admission.reservations.find(f"r{n}") for n in range(1, 41)]:
        if plan.prefill_id == "p7":
            world.admission.finish(plan.request_id, 0, 0.0)
    assert world.plan(world.request(500)).prefill.replica_id == "p7", "the only one that is free again"
    for number in range(20):
        world.report(f"d{number}", now=5.0)
    for number in range(3):
        world.report(f"p{number}", now=5.0)
    assert world.decide(world.request(500), now=5.0).prefill.info.replica_id in {"p0", "p1", "p2"}
    world.admission.replica_lost("p1")
    world.report("p2", draining=True, now=5.0)
    assert world.decide(world.request(500), now=5.0).prefill.info.replica_id == "p0"


@pytest.mark.parametrize("prefills", [False, True])
def test_who_is_nearly_done_with_a_long_prompt_is_among_the_few(prefills):
    """What was longest when it was sent is the shortest now, and nobody has told anything meanwhile."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0 if prefills else None))
    world.fleet(20 if prefills else 0, 20)

    def taker(request, now):
        plan = world.plan(request, now)
        return (plan.prefill or plan.decode).replica_id

    long = taker(world.request(4000), 0.0)
    ends_s = world.admission.policy._sites.find(long).queue_s
    others = {taker(world.request(3000), ends_s - 0.1) for _ in range(19)}
    assert len(others | {long}) == 20
    weighed = world.decide(world.request(500), ends_s - 0.02).candidates
    assert long in {one.prefill_id or one.decode_id for one in weighed}


def test_what_a_replica_says_of_a_queue_that_others_filled_counts_from_then_on():
    """As for a scheduler that has just started: it sent none of these prompts."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0))
    world.fleet(20, 20)
    for number in range(20):
        world.report(f"p{number}", num_waiting=1, num_waiting_tokens=4000 if number % 2 else 10, now=100.0)
    takers = {world.plan(world.request(500), 100.01).prefill.replica_id for _ in range(10)}
    assert takers == {f"p{number}" for number in range(0, 20, 2)}


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_that_should_be_over_is_as_good_as_none(seed):
    """Ten replicas are late with their prompts: their requests count, not how late somebody is."""
    rng, now = random.Random(seed), 1000.0
    world = World(SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0, reservation_ttl_s=1e9))
    world.fleet(20, 20)
    late = set()
    for _ in range(10):
        now += 0.003 * rng.random()
        late.add(world.plan(world.request(rng.randrange(300, 900)), now).prefill.replica_id)
    takers = {world.plan(world.request(300), now + 5.0).prefill.replica_id for _ in range(10)}
    assert len(late) == len(takers) == 10 and not late & takers


def test_all_that_avoid_is_obeyed_in_a_large_pool():
    world = World(SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0))
    world.fleet(20, 20)
    avoid = tuple(f"{kind}{n}" for kind in "pd" for n in range(19))
    decision = world.decide(world.request(500, avoid=avoid))
    assert (decision.prefill.info.replica_id, decision.decode.info.replica_id) == ("p19", "d19")

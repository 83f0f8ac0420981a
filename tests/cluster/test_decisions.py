"""Which candidate wins, and by how much: decisions on fleets whose times are known. See scheduler_world for those."""

import random

import pytest

from cluster.scheduler.decision import DecisionMaker
from cluster.scheduler.handoff_time import left_s
from cluster.scheduler.strain import Strain
from core.config import SchedulerConfig
from core.messages.fleet import Role
from core.messages.to_scheduler import Progress, TierStatus, TokenPace
from tests.cluster.scheduler_world import (
    BLOCK,
    CHUNK_S,
    CONTEXT_S,
    PAIR_S,
    SEQUENCE_S,
    STEP_S,
    TOKEN_BYTES,
    TOKEN_S,
    World,
    blocks_of,
)

PAIRS_ONLY = SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0)
MiB = 2**20


def link(source: str, bytes_per_s: float, latency_s: float = 0.0005):
    """Transfers of two sizes, as often as a fit wants them."""
    sizes = (MiB, 64 * MiB)
    return [(source, num_bytes, latency_s + num_bytes / bytes_per_s) for num_bytes in sizes] * 20


def prefill_s(num_tokens: int, num_cached: int = 0) -> float:
    pairs = num_tokens * (num_cached + (num_tokens + 1) / 2)
    return CHUNK_S * -(-num_tokens // 2048) + TOKEN_S * num_tokens + PAIR_S * pairs


# ---- transfers --------------------------------------------------------------------------------------------------


def test_compute_hides_all_of_a_transfer_but_its_last_piece():
    """100 MB over 10 GB/s is 10 ms: done beside 100 ms of compute, but for the last piece's 0.1 ms."""
    whole = {"last_bytes": 1e6, "backlog_bytes": 0, "before_s": 0, "compute_s": 0.1, "first_s": 0.001}
    assert left_s(num_bytes=1e8, byte_s=1e-10, **whole) == pytest.approx(1e-4)
    slow = left_s(num_bytes=1e8, byte_s=2e-9, **whole)
    assert slow == pytest.approx(0.001 + 0.2 - 0.1), "a wire of 0.5 GB/s is behind from the first piece on"


def test_a_backlog_delays_a_transfer_unless_it_is_gone_before():
    parts = {"num_bytes": 1e8, "last_bytes": 1e6, "byte_s": 1e-9, "compute_s": 0.05, "first_s": 0.001}
    alone = left_s(backlog_bytes=0, before_s=0, **parts)
    assert alone == pytest.approx(0.051)
    assert left_s(backlog_bytes=2e8, before_s=0, **parts) == pytest.approx(0.2 + 0.1 - 0.05)
    assert left_s(backlog_bytes=2e8, before_s=0.3, **parts) == alone


@pytest.mark.parametrize(("fast", "slow"), [("d0", "d1"), ("d1", "d0")])
def test_the_faster_link_wins(fast, slow):
    world = World(PAIRS_ONLY)
    world.fleet(1, 2)
    world.report(fast, transfers=link("p0", 20e9))
    world.report(slow, transfers=link("p0", 0.2e9))
    decision = world.decide(world.request(1000))
    assert decision.decode.info.replica_id == fast
    other = next(c for c in world.decide(world.request(1000, avoid=(fast,))).candidates)
    assert other.decode_id == slow
    # 131 MB take 656 ms at 0.2 GB/s, of which 54 ms of compute hide little
    left = 1000 * TOKEN_BYTES / 0.2e9 - prefill_s(1000)
    assert other.terms.transfer_s == pytest.approx(left, rel=0.1)
    assert decision.terms.transfer_s < 0.005


def test_bytes_in_flight_turn_a_request_to_another_link():
    world = World(PAIRS_ONLY)
    world.fleet(2, 2)
    for name in ("d0", "d1"):
        for source in ("p0", "p1"):
            world.report(name, transfers=link(source, 1e9))
    first = world.plan(world.request(8000))
    # equal but for what is on its way: the other replicas at both ends
    second = world.plan(world.request(500))
    assert second.decode.replica_id != first.decode.replica_id
    assert second.prefill.replica_id != first.prefill.replica_id
    flights = world.admission.policy.learned.flights
    assert flights.before(first.prefill.replica_id, "d9") == 8000 * TOKEN_BYTES
    world.admission.progress(Progress(first.request_id), 0.5)
    assert flights.before(first.prefill.replica_id, "d9") == 8000 * TOKEN_BYTES  # computed, and on its way
    world.report(first.decode.replica_id)
    assert flights.before(first.prefill.replica_id, first.decode.replica_id) == 0


def test_what_decode_has_cached_is_not_sent_and_draws_the_request():
    world = World(PAIRS_ONLY)
    world.fleet(1, 2)
    for name in ("d0", "d1"):
        world.report(name, transfers=link("p0", 1e9))
    tokens = range(4000)
    world.report("d1", stored=blocks_of(tokens, 3200))
    decision = world.decide(world.request(4000, tokens=tokens))
    assert decision.decode.info.replica_id == "d1"
    assert decision.num_transfer_bytes == (4000 - 3200) * TOKEN_BYTES
    assert decision.num_decode_blocks == (4000 - 3200) // BLOCK
    by_decode = {candidate.decode_id: candidate.terms for candidate in world.decide(
        world.request(4000, tokens=tokens, avoid=("d1",))).candidates}  # fmt: skip
    assert by_decode["d0"].transfer_s > 10 * decision.terms.transfer_s


# ---- prefill side -----------------------------------------------------------------------------------------------


def test_the_queue_is_measured_in_seconds_of_the_work_before():
    """Behind a prompt of 8,000 tokens stand its own 404 ms of products and what attention takes; p1 is idle."""
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    world.plan(world.request(2000))
    behind = world.decide(world.request(1000))
    assert behind.terms.queue_s == pytest.approx(prefill_s(2000), rel=0.05)
    assert behind.terms.prefill_s == pytest.approx(prefill_s(1000), rel=0.05)
    # half of it is computed, says the next report, with the one request there
    world.report("p0", num_running=1, num_waiting_tokens=1000)
    assert world.decide(world.request(1000)).terms.queue_s == pytest.approx(prefill_s(2000) / 2, rel=0.05)


def test_work_that_runs_is_nearer_to_its_end_the_longer_it_runs():
    """Between two reports time goes by, and nobody says so."""
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    world.plan(world.request(2000))
    half_s = prefill_s(2000) / 2
    assert world.decide(world.request(1000), now=half_s).terms.queue_s == pytest.approx(half_s, rel=0.05)
    assert world.decide(world.request(1000), now=1.0).terms.queue_s == 0.0


def test_short_prompts_share_a_step():
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    for _ in range(10):
        world.plan(world.request(100))
    assert world.decide(world.request(1000)).terms.queue_s == pytest.approx(prefill_s(1000), rel=0.05)


def test_first_tokens_overtake_a_colocated_replicas_report():
    """What the report says waits there has gone since, and all that is there was sent from here."""
    world = World()
    world.add("d0", Role.DECODE)
    request = world.request(2000)
    world.plan(request)
    world.report("d0", num_running=1, num_waiting_tokens=2000)
    world.admission.progress(Progress(request.request_id, 0), 0.0)
    assert world.decide(world.request(1000)).terms.queue_s == 0.0
    # somebody else's prompt is there, too: only the report knows
    world.report("d0", num_running=2, num_waiting_tokens=2000)
    assert world.decide(world.request(1000)).terms.queue_s > 0.09


def test_attention_to_a_long_context_is_counted():
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    tokens = range(60_000)
    world.report("p0", stored=blocks_of(tokens, 59_200))
    terms = world.decide(world.request(60_000, tokens=tokens)).terms
    assert terms.prefill_s == pytest.approx(prefill_s(800, 59_200), rel=0.05)
    assert terms.prefill_s > 1.9 * prefill_s(800), "more than half of it is attention"


@pytest.mark.parametrize("names", ["abc", "bca", "cab"])
def test_a_cold_prompt_goes_where_it_evicts_least(names):
    """A prompt of 1000 blocks: in one cache of 2000 all hold something, in the other all but 500, then all but 900."""
    world = World(PAIRS_ONLY)
    for name in "abc":
        world.add(name, Role.DECODE, num_blocks=2000)
    cached = range(10**9, 10**9 + 2000 * BLOCK)
    for name, num_cached in zip(names, (2000, 1500, 1100), strict=True):
        world.report(name, stored=blocks_of(cached, num_cached * BLOCK))
    assert world.decide(world.request(16_000)).decode.info.replica_id == names[2]
    warm = world.request(27_200, tokens=cached[:27_200])
    assert world.decide(warm).decode.info.replica_id == names[0], "what is cached needs no room"


@pytest.mark.parametrize(("full", "empty"), [("p0", "p1"), ("p1", "p0")])
def test_prefill_of_a_cold_prompt_goes_where_it_evicts_least_too(full, empty):
    world = World(PAIRS_ONLY)
    world.fleet(2, 1)
    world.report(full, stored=blocks_of(range(10**9, 10**9 + 39_900 * BLOCK)))
    assert world.decide(world.request(16_000)).prefill.info.replica_id == empty


def test_a_replica_at_half_speed_gets_less():
    """Both idle, the slow one takes none; the fast one takes the next as long as its queue is the shorter wait."""
    world = World(PAIRS_ONLY)
    world.add("p0", Role.PREFILL, slow=2.0)
    world.add("p1", Role.PREFILL)
    world.add("d0", Role.DECODE)
    world.report("d0", transfers=link("p0", 50e9) + link("p1", 50e9))
    first, second, third = (world.plan(world.request(1000)) for _ in range(3))
    assert [p.prefill.replica_id for p in (first, second, third)] == ["p1", "p0", "p1"] or [
        p.prefill.replica_id for p in (first, second, third)
    ] == ["p1", "p1", "p0"]
    costs = world.admission.policy.learned.costs
    slow, fast = (costs.of(world.admission.fleet.get(name)) for name in ("p0", "p1"))
    assert slow.token_s / fast.token_s == pytest.approx(2, rel=0.1)


# ---- pulls and tiers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bytes_per_s", "pulled"), [(20e9, True), (1e9, False)])
def test_a_prefix_is_pulled_when_the_link_beats_computing(bytes_per_s, pulled):
    """p1 holds 16,000 tokens and is busy: computing them again takes 0.96 s, 2.1 GB take 0.1 s or 2.1 s."""
    world = World(PAIRS_ONLY)
    world.fleet(2, 1)
    world.report("p0", transfers=link("p1", bytes_per_s))
    tokens = range(16_100)
    world.report("p1", stored=blocks_of(tokens, 16_000), num_waiting=1, num_waiting_tokens=50_000)
    decision = world.decide(world.request(16_100, tokens=tokens))
    assert decision.prefill.info.replica_id == "p0"
    assert (decision.lender is not None) == pulled
    if pulled:
        assert decision.lender.info.replica_id == "p1"
        assert decision.terms.pull_s == pytest.approx(16_000 * TOKEN_BYTES / 20e9, rel=0.1)
        assert decision.terms.prefill_s == pytest.approx(prefill_s(100, 16_000), rel=0.1)
        assert decision.num_cached_tokens == 16_000
    else:
        assert decision.terms.prefill_s == pytest.approx(prefill_s(16_100), rel=0.05)


@pytest.mark.parametrize(("tier", "seconds"), [(0, 0.0), (1, 0.0419), (2, 0.419)])
def test_blocks_below_the_device_cost_their_way_back(tier, seconds):
    """3,200 tokens are 419 MB: at 10 GB/s from host memory, at 1 GB/s from disk."""
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    tokens = range(4000)
    held = blocks_of(tokens, 3200)
    tiers = (
        TierStatus("device", 1, 1),
        TierStatus("host", 1, 1, restore_bytes_per_s=10e9),
        TierStatus("disk", 1, 1, restore_bytes_per_s=1e9),
    )
    world.report("p0", stored=held, tiers=bytes([tier] * len(held)) if tier else b"", tier_status=tiers)
    decision = world.decide(world.request(4000, tokens=tokens))
    assert decision.terms.restore_s == pytest.approx(seconds, rel=0.01)
    assert decision.terms.prefill_s == pytest.approx(prefill_s(800, 3200), rel=0.05)


def test_of_two_holders_the_one_with_the_prefix_on_its_device_wins():
    world = World(PAIRS_ONLY)
    world.fleet(2, 1)
    tokens = range(4000)
    held = blocks_of(tokens, 3200)
    world.report("p0", stored=held, tiers=bytes([1] * len(held)))
    world.report("p1", stored=held)
    assert world.decide(world.request(4000, tokens=tokens)).prefill.info.replica_id == "p1"
    # evicted there, kept below: now both pay, and p0 is first by name
    world.report("p1", stored=held, tiers=bytes([1] * len(held)))
    assert world.decide(world.request(4000, tokens=tokens)).prefill.info.replica_id == "p0"


# ---- decode side ------------------------------------------------------------------------------------------------


def test_the_itl_after_joining_is_predicted_and_bounds_the_batch():
    """100 sequences of 1,000 tokens: 8 + 5.05 + 2.04 ms."""
    config = SchedulerConfig(replica_timeout_s=1e9, local_prefill_max_tokens=0, itl_slo_s=0.02)
    world = World(config)
    world.fleet(1, 2)
    world.report("d0", num_running=100, num_kv_tokens=100_000, num_free_blocks=20_000)
    world.report("d1", num_running=240, num_kv_tokens=240_000, num_free_blocks=10_000)
    tokens = range(2000)
    world.report("d1", stored=blocks_of(tokens, 1984))
    decision = world.decide(world.request(2000, tokens=tokens))
    assert decision.decode.info.replica_id == "d0", "d1 has the prompt, and would take 25 ms a step"
    expected = STEP_S + 101 * SEQUENCE_S + CONTEXT_S * (100_000 + 2000 + 32)
    assert decision.terms.itl_s == pytest.approx(expected, rel=0.03)
    world.report("d0", draining=True)
    assert world.decide(world.request(2000, tokens=tokens)) is None


@pytest.mark.parametrize(("port_bytes_per_s", "lender"), [(50e9, "p0"), (0.0, None)])
def test_a_prefix_is_pulled_over_fast_ports_that_nothing_moved_over_yet(port_bytes_per_s, lender):
    """60,000 tokens take 4.8 s to compute, their 7.9 GB 0.2 s over 50 GB/s, 5.2 s where nobody says how fast it is."""
    world = World(PAIRS_ONLY)
    for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE)):
        world.add(name, role, port_bytes_per_s=port_bytes_per_s)
    tokens = range(60_000)
    world.report("p0", stored=blocks_of(tokens), num_waiting=1, num_waiting_tokens=100_000)
    decision = world.decide(world.request(60_000, tokens=tokens))
    assert decision.prefill.info.replica_id == "p1"
    assert (decision.lender and decision.lender.info.replica_id) == lender


def test_long_prompts_do_not_all_go_beside_the_smallest_batch():
    """One of 8,192 tokens each 0.8 s takes 0.5 s: beside one batch its tokens would take 20 ms in place of 9."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.015))
    world.fleet(0, 2)
    world.report("d0", num_running=20, num_kv_tokens=20_000, num_free_blocks=20_000)
    world.report("d1", num_running=22, num_kv_tokens=22_000, num_free_blocks=20_000)
    places = []
    for number in range(12):
        now = 0.8 * number
        plan = world.plan(world.request(8192, max_new_tokens=1), now)
        places.append(plan.decode.replica_id)
        world.admission.progress(Progress(plan.request_id), now + 0.6)
        world.admission.finish(plan.request_id, 0, now + 0.6, 1)
    assert places[0] == "d0"
    assert 4 <= places.count("d1") <= 6, places


def test_strain_is_a_cost_like_seconds():
    """ITL 0.02, TTFT 2 s: nothing up to 16 ms, then 0.3 s for each ms; so a fuller batch is joined to save more."""
    strain = Strain(2.0, 0.02)
    assert strain.seconds(0.016) == 0.0
    assert strain.seconds(0.022) == pytest.approx(6 * 0.3)


def test_a_long_prompt_strains_its_batch_until_it_is_computed():
    """80,000 tokens in steps of 0.15 s and more: that is the ITL of whoever joins, at the end as in the beginning."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.05))
    world.fleet(0, 1)
    world.report("d0", num_running=4, num_kv_tokens=4000, num_free_blocks=30_000)
    world.plan(world.request(80_000))
    for now in (0.1, 4.0, 7.0):
        batch = world.request(100, slo_class="batch")
        assert world.decide(batch, now) is None or world.decide(batch, now).terms.itl_s > 0.1


def test_an_idle_replica_is_not_charged_for_what_nobody_sat_beside():
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.012))
    world.fleet(0, 2)
    world.report("d1", num_running=4, num_kv_tokens=4000, num_free_blocks=30_000)
    for number in range(8):
        plan = world.plan(world.request(4096, max_new_tokens=1), 0.5 * number)
        assert plan.decode.replica_id == "d0"
        world.admission.progress(Progress(plan.request_id), 0.5 * number + 0.3)
        world.admission.finish(plan.request_id, 0, 0.5 * number + 0.3, 1)
    decision = world.decide(world.request(400), 4.0)
    assert decision.decode.info.replica_id == "d0" and decision.terms.strain_s == 0


def test_an_absurd_slo_is_no_reason_to_fail():
    world = World()
    world.fleet(1, 1)
    world.report("d0", num_running=4, num_kv_tokens=4000, num_free_blocks=30_000)
    for itl_slo_s in (1e-300, 1e-320):
        assert world.decide(world.request(400, itl_slo_s=itl_slo_s)) is not None


@pytest.mark.parametrize("seed", range(6))
def test_what_is_pruned_is_never_better_on_links_that_nobody_used(seed):
    rng = random.Random(seed)
    worlds = [
        World(PAIRS_ONLY, policy=DecisionMaker(PAIRS_ONLY, exhaustive=exhaustive)) for exhaustive in (False, True)
    ]
    for number in range(10):
        name, role = (f"p{number}", Role.PREFILL) if number < 5 else (f"d{number}", Role.DECODE)
        changes = {"port_bytes_per_s": rng.choice((0.0, 1e9, 50e9, 400e9))}
        load = {"num_waiting": 1, "num_waiting_tokens": rng.randrange(4000)} if number < 5 else {
            "num_running": rng.randrange(40), "num_kv_tokens": rng.randrange(100_000)
        }  # fmt: skip
        for world in worlds:
            world.add(name, role, **changes)
            world.report(name, **load)
    for _ in range(20):
        num_tokens, moved = rng.randrange(100, 20_000), (rng.randrange(10**8), rng.random())
        pruned, full = (world.decide(world.request(num_tokens)) for world in worlds)
        assert pruned.terms.cost_s == pytest.approx(full.terms.cost_s, abs=2e-4)
        for world in worlds:
            world.report(f"d{5 + moved[0] % 5}", transfers=[(f"p{moved[0] % 4}", moved[0] + 1, 0.002 + moved[1] / 100)])


# ---- local prefill ----------------------------------------------------------------------------------------------


def test_an_idle_decode_replica_prefills_by_itself():
    """Nobody is slowed, and nothing is sent."""
    world = World()
    world.fleet(2, 1)
    plan = world.plan(world.request(4000))
    assert (plan.prefill, plan.reason) == (None, "local_faster")


@pytest.mark.parametrize(
    ("num_tokens", "cached", "reason"),
    [(4000, 0, "pair"), (4000, 3904, "local_faster"), (500, 0, "local_faster")],
)
def test_beside_a_batch_decode_prefills_what_keeps_its_steps_within_the_slo(num_tokens, cached, reason):
    """64 sequences, SLO 50 ms. A chunk of 2,048 tokens makes a step of 110 ms, one of 500 some 34 ms."""
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.05))
    world.fleet(1, 1)
    tokens = range(num_tokens)
    world.report("d0", num_running=64, num_kv_tokens=64_000, num_free_blocks=30_000, stored=blocks_of(tokens, cached))
    decision = world.decide(world.request(num_tokens, tokens=tokens))
    assert decision.reason == reason
    if reason != "pair":
        assert decision.terms.itl_s <= 0.05
        assert decision.predicted_ttft_s < min(
            c.terms.ttft_s for c in decision.candidates if c.reason == "pair"
        )  # fmt: skip


def test_saturated_prefill_sends_prompts_to_decode_within_the_slo_and_has_others_wait():
    world = World(SchedulerConfig(replica_timeout_s=1e9, itl_slo_s=0.05))
    world.fleet(1, 1)
    world.report("p0", num_waiting=3, num_waiting_tokens=6000)
    world.report("d0", num_running=64, num_kv_tokens=64_000, num_free_blocks=30_000)
    assert world.decide(world.request(4000)) is None
    assert world.decide(world.request(400)).reason == "local_saturated"
    world.report("d0", num_running=0, num_kv_tokens=0)
    assert world.decide(world.request(4000)).reason == "local_idle"


def test_a_client_that_insists_is_obeyed():
    world = World()
    world.fleet(1, 1)
    assert world.decide(world.request(100, placement="pair")).reason == "pair"
    world.report("d0", num_running=64, num_kv_tokens=64_000)
    assert world.decide(world.request(8000, placement="local")).reason == "local_asked"


# ---- what a decision keeps --------------------------------------------------------------------------------------


def test_a_decision_keeps_its_candidates_with_terms_that_add_up():
    world = World()
    world.fleet(2, 2)
    for name in ("d0", "d1"):
        world.report(name, num_running=64, num_kv_tokens=64_000)
    decision = world.decide(world.request(4000))
    best, *others = decision.candidates
    assert (best.prefill_id, best.decode_id) == (decision.prefill.info.replica_id, decision.decode.info.replica_id)
    assert best.terms == decision.terms
    terms = decision.terms
    assert terms.first_token_s == terms.queue_s + terms.pull_s + terms.restore_s + terms.prefill_s
    assert terms.ttft_s == pytest.approx(terms.first_token_s + terms.transfer_s + terms.wait_s)
    assert all(other.terms.ttft_s >= terms.ttft_s - 1e-4 for other in others)


def test_a_decision_that_is_over_is_explained_without_its_prompts_hashes():
    """2000 of them at 32k tokens, in each of thousands of decisions."""
    world = World()
    world.fleet(1, 1)
    plan = world.plan(world.request(32_000))
    assert len(world.admission.reservations.find(plan.request_id).request.block_hashes) == 2000
    world.admission.progress(Progress(plan.request_id, 0), 1.0)
    world.admission.finish(plan.request_id, 0, 2.0, 11, TokenPace(None, 0.1))
    ((kept, _),) = world.admission.decisions._kept
    assert kept.request.block_hashes == ()
    (explained,) = world.admission.decisions.find(plan.request_id)
    assert (explained.num_tokens, explained.actual_itl_s, explained.is_over) == (32_000, 0.1, True)


# ---- predictions against what came ------------------------------------------------------------------------------


def test_errors_of_ttft_and_missed_hits_are_told():
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    tokens = range(1000)
    world.report("p0", stored=blocks_of(tokens, 960))
    hit = world.plan(world.request(1000, tokens=tokens))
    actual = 2 * world.admission.reservations.find(hit.request_id).decision.terms.first_token_s
    world.admission.progress(Progress(hit.request_id, 960), actual)
    missed = world.plan(world.request(1000, tokens=tokens))
    world.admission.progress(Progress(missed.request_id, 320), 1.0)
    unknown = world.plan(world.request(1000, tokens=tokens))
    world.admission.progress(Progress(unknown.request_id), 1.0)
    foresight = world.admission.policy.foresight()
    ttft = next(error for error in foresight.errors if error.quantity == "ttft")
    assert ttft.num_samples == 3 and ttft.p95 >= ttft.median > 0.5
    assert (foresight.num_hits_checked, foresight.num_hits_missed, foresight.num_tokens_missed) == (2, 1, 960 - 320)


def test_what_others_were_still_to_compute_is_no_missed_hit():
    """A third of the prompt is cached, and another request computes the second third first."""
    world = World(PAIRS_ONLY)
    world.fleet(1, 1)
    tokens = range(3000)
    world.report("p0", stored=blocks_of(tokens, 960))
    plans = [world.plan(world.request(num_tokens, tokens=tokens[:num_tokens])) for num_tokens in (2000, 3000)]
    decided = [world.admission.reservations.find(plan.request_id).decision for plan in plans]
    assert [(one.num_cached_tokens, one.num_indexed_tokens) for one in decided] == [(960, 960), (2000, 960)]
    for plan in plans:
        world.admission.progress(Progress(plan.request_id, 960), 1.0)
    foresight = world.admission.policy.foresight()
    assert (foresight.num_hits_checked, foresight.num_hits_missed, foresight.num_tokens_missed) == (2, 0, 0)

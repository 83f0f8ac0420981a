"""Scenarios so small that every time in them can be added up by hand."""

import pytest

from core.messages.fleet import Role
from simulator.baselines.catalog import find_policy
from simulator.traces.trace import Run, TracedRequest
from simulator.twin import Twin
from tests.simulator.costs import COSTS, AffineCost, small_fleet, traced

LATENCY = 0.001  # of a control message
BASE, PROMPT, DECODE, CONTEXT = 0.008, 1e-4, 1e-4, 1e-8
BLOCK_BYTES = 4 * 2 * 2 * 8 * 2 * 4  # layers, planes, heads, size, bytes, tokens


def alone(spec, *requests: TracedRequest):
    """Not before the scheduler has heard of the replicas."""
    return Twin(spec, COSTS).run(requests).records


def decode_steps(context: int, num_steps: int) -> list[float]:
    return [BASE + DECODE + CONTEXT * (context + step) for step in range(num_steps)]


def test_one_prompt_through_one_pair():
    spec = small_fleet(1, 1, scheduler__local_prefill_max_tokens=0)
    (record,) = alone(spec, traced(0, 1.0, tuple(range(12)), 4))
    assert record.reason == "pair"
    messages = 6 * LATENCY  # reserve, plan, open, ticket, prompt, first token
    step = BASE + 12 * PROMPT
    assert record.ttft_s == pytest.approx(messages + step, abs=1e-12)
    # Three blocks, in two groups of layers. The first group is announced half-way, its bytes hide behind the rest.
    group_s = 0.001 + 3 * BLOCK_BYTES / 2 / 1e6
    assert group_s < step / 2
    announced = LATENCY + group_s  # after prefill's step; the commit, which takes LATENCY, comes before the bytes
    gaps = [announced - LATENCY + decode_steps(12, 1)[0] + LATENCY, *decode_steps(13, 2)]
    assert record.itl_max_s == pytest.approx(gaps[0], abs=1e-12)
    assert record.itl_mean_s == pytest.approx(sum(gaps) / 3, abs=1e-12)
    assert record.finished_s == pytest.approx(1.0 + record.ttft_s + sum(gaps), abs=1e-12)
    assert record.num_transfer_bytes == 3 * BLOCK_BYTES


def test_a_prompt_computed_where_it_is_decoded():
    (record,) = alone(small_fleet(0, 1), traced(0, 1.0, tuple(range(100)), 3))
    assert record.reason == "local_no_prefill"
    chunks = 2 * BASE + 100 * PROMPT  # 64 tokens, then 36
    assert record.ttft_s == pytest.approx(4 * LATENCY + chunks, abs=1e-12)  # reserve, plan, open, token
    assert record.itl_mean_s == pytest.approx(sum(decode_steps(100, 2)) / 2, abs=1e-12)


def test_a_second_turn_computes_what_the_first_left_uncached():
    first = TracedRequest("a", 1.0, (Run(5, 10),), (Run(9, 6),))
    second = TracedRequest("b", 2.0, (Run(5, 10), Run(9, 6), Run(7, 4)), (Run(8, 2),))
    records = alone(small_fleet(0, 1), first, second)
    assert [record.num_cached_tokens for record in records] == [0, 12]  # 15 of 16 have KV: three whole blocks
    assert records[1].ttft_s == pytest.approx(4 * LATENCY + BASE + 8 * PROMPT, abs=1e-12)


def test_a_replica_at_half_speed_takes_twice_the_time():
    spec = small_fleet(0, 1, decode__speeds={0: 0.5})
    (record,) = alone(spec, traced(0, 1.0, tuple(range(8)), 3))
    assert record.ttft_s == pytest.approx(4 * LATENCY + 2 * (BASE + 8 * PROMPT), abs=1e-12)
    assert record.itl_mean_s == pytest.approx(sum(decode_steps(8, 2)), abs=1e-12)


def test_requests_wait_at_the_scheduler_while_prefill_holds_two_steps_of_work():
    spec = small_fleet(1, 1, scheduler__local_prefill_max_tokens=0, decode__num_blocks=400, prefill__num_blocks=400)
    requests = [traced(i, 1.0, tuple(range(100 * i, 100 * i + 64)), 1) for i in range(4)]
    records = {record.request_id: record for record in alone(spec, *requests)}
    assert [records[f"r{i}"].queued_s > 0 for i in range(4)] == [False, False, True, True]


def test_those_who_wait_too_long_are_refused():
    spec = small_fleet(
        1, 1, scheduler__local_prefill_max_tokens=0, scheduler__queue_timeout_s=0.05, prefill__max_num_batched_tokens=16
    )
    slow = {role: AffineCost(base_s=0.3) for role in COSTS}
    requests = [traced(i, 1.0, tuple(range(100 * i, 100 * i + 32)), 1) for i in range(4)]
    records = Twin(spec, slow).run(requests).records
    outcomes = sorted(record.outcome for record in records)
    assert outcomes == ["Overloaded"] * 3 + ["length"]
    refused = [record for record in records if record.outcome == "Overloaded"]
    assert all(0.05 < record.finished_s - record.arrived_s < 0.05 + 0.1 + 3 * LATENCY for record in refused)


def test_who_makes_room_goes_on_with_what_was_shown():
    """Two answers outgrow the cache, as the rule did not foresee: the newer one is handed back, and goes on."""
    spec = small_fleet(0, 1, decode__num_blocks=12, scheduler__max_decode_kv_usage=1.0)
    twin = Twin(spec, COSTS, make_policy=find_policy("least-outstanding"))
    records = twin.run([traced(0, 1.0, tuple(range(8)), 24), traced(1, 1.0, tuple(range(20, 28)), 24)]).records
    by_id = {record.request_id: record for record in records}
    assert by_id["r0"].num_attempts == 1 and by_id["r1"].num_attempts > 1
    assert all(record.num_output_tokens == 24 and record.outcome == "length" for record in records)


def test_a_prefix_is_pulled_from_whoever_has_it():
    spec = small_fleet(
        2,
        2,
        scheduler__pull_min_tokens=8,
        scheduler__local_prefill_max_tokens=0,
        link__bytes_per_s=1e9,
        prefill__num_blocks=400,
        decode__num_blocks=400,
    )
    prompt = tuple(range(60))
    slow = {role: AffineCost(prompt_s=5e-3) for role in COSTS}
    requests = [traced(i, 1.0 + 0.6 * (i > 0), (*prompt, *range(100 * i, 100 * i + 40)), 2) for i in range(4)]
    twin = Twin(spec, slow)
    result = twin.run(requests)
    first, *later = sorted(result.records, key=lambda record: record.request_id)
    assert any(record.prefill != first.prefill for record in later)
    assert [record.num_cached_tokens for record in later] == [60, 60, 60]
    assert result.num_transfer_bytes > sum(record.num_transfer_bytes for record in result.records)


def test_a_gap_after_each_step_delays_its_tokens_and_the_next_step():
    spec = small_fleet(1, 1, scheduler__local_prefill_max_tokens=0, prefill__step_gap_s=0.002, decode__step_gap_s=0.003)
    twin = Twin(spec, COSTS)
    (record,) = twin.run([traced(0, 1.0, tuple(range(100)), 40)]).records
    chunks = 2 * BASE + 100 * PROMPT + 2 * 0.002  # 64 tokens, then 36
    assert record.ttft_s == pytest.approx(6 * LATENCY + chunks, abs=1e-12)
    steps = decode_steps(100, 39)
    rest = record.finished_s - record.first_token_s - steps[0] - 0.003
    handoff = record.itl_max_s - steps[0] - 0.003
    assert rest - handoff == pytest.approx(sum(steps[1:]) + 38 * 0.003, abs=1e-9)
    (decode,) = twin.fleet.in_pool(Role.DECODE)
    assert decode.busy_s == pytest.approx(sum(steps), abs=1e-9)  # gaps are no work, nor part of what it reports

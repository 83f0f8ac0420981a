"""Benchmarks of clients in loops, whose times are worked out by hand."""

import pytest

from simulator.cost.apart_loop import apart_times
from simulator.cost.closed_loop import TOKEN_BUDGET, LoopShape, loop_times, play
from simulator.cost.cost_model import StepWork


def seconds(work: StepWork) -> tuple[float]:
    """A millisecond each step, and ten for a budget of prompts."""
    return (1e-3 + 1e-2 * sum(num for num, _ in work.chunks) / TOKEN_BUDGET,)


def test_a_client_alone_waits_for_its_prompt_and_then_a_step_for_each_token():
    times = loop_times(LoopShape(1, TOKEN_BUDGET, 50), seconds)
    assert times.first_ttft[0] == pytest.approx(0.011, rel=1e-3)
    assert times.early_tpot[0] == times.last_tpot[0] == pytest.approx(1e-3)


def test_a_long_prompt_takes_a_step_for_each_budget_of_it():
    steps = play(LoopShape(1, 2 * TOKEN_BUDGET + 5, 3))[:4]
    assert [step.work.chunks for step in steps[:3]] == [
        ((TOKEN_BUDGET, 0),),
        ((TOKEN_BUDGET, TOKEN_BUDGET),),
        ((5, 2 * TOKEN_BUDGET),),
    ]
    assert steps[3].work == StepWork((), 1, 2 * TOKEN_BUDGET + 6)
    assert steps[3].num_steps == 2


def test_two_prompts_of_a_whole_budget_each_slow_the_other_once_in_every_output():
    times = loop_times(LoopShape(2, TOKEN_BUDGET - 1, 101), seconds)
    # The first waits for its own prompt, the second for both: 11 and 22 ms.
    assert times.first_ttft[0] == pytest.approx(0.0165, rel=1e-3)
    # One more prompt beside 100 tokens; none comes behind the very last.
    assert times.early_tpot[0] == pytest.approx(1e-3 + 0.010 / 100, rel=1e-3)
    assert times.last_tpot[0] == pytest.approx(1e-3 + 0.010 / 200, rel=1e-3)


def test_prompts_first_keep_clients_in_step_so_that_half_of_them_stand_still():
    times = loop_times(LoopShape(2, TOKEN_BUDGET - 1, 101, prompts_first=True), seconds)
    # The first decodes nothing before the second's prompt is done: both end together, and come together again.
    assert times.first_ttft[0] == pytest.approx(0.0165, rel=1e-3)
    assert times.early_tpot[0] == times.last_tpot[0] == pytest.approx(1e-3 + 0.011 / 200, rel=1e-3)


def test_every_token_is_decoded_once_whatever_the_sizes():
    shape = LoopShape(24, 3000, 300, least_size=0.8)
    steps = play(shape)
    prompts = sum(num for step in steps for num, _ in step.work.chunks)
    outputs = sum(step.num_steps * step.work.num_decoding for step in steps)
    assert prompts / (3 * 24) == pytest.approx(0.9 * 3000, rel=0.01)
    assert outputs / (3 * 24) == pytest.approx(0.9 * 300 - 1, rel=0.01)
    # Each request passes as many steps as its output has tokens behind the first.
    times = loop_times(shape, lambda work: (1.0,))
    assert times.early_tpot[0] == pytest.approx(1.0)
    assert times.last_tpot[0] == pytest.approx(1.0)


def test_sizes_that_differ_spread_arrivals_so_that_prompts_come_alone():
    alike, spread = play(LoopShape(8, 1000, 500)), play(LoopShape(8, 1000, 500, least_size=0.8))
    prompts_at_once = [[len(step.work.chunks) for step in steps if step.work.chunks] for steps in (alike, spread)]
    assert prompts_at_once[0] == [8, 8, 8]
    assert prompts_at_once[1][0] == 8 and sum(prompts_at_once[1]) == 24
    assert max(prompts_at_once[1][1:]) <= 2


def test_replicas_that_decode_apart_share_clients_when_prompts_are_quick():
    # Steps of 10 ms whatever the number that decodes: rounds of 1 ms + 1 s.
    times = apart_times(200, 100, 4, 2, 1e-3, lambda num: 0.01)
    assert times.tpot_s == pytest.approx(0.01)
    assert times.later_ttft_s == pytest.approx(1e-3)
    assert times.first_ttft_s == pytest.approx(25.5e-3)


def test_clients_wait_for_prompts_that_come_no_faster():
    # Two prompts a second, outputs of 100 tokens in steps of 2 ms and 1 ms for each sequence.
    times = apart_times(50, 100, 1, 1, 0.5, lambda num: 2e-3 + 1e-3 * num)
    # n = 2 * 100 * (2 + n) / 1000, so n = 0.4 / 0.8, but no fewer than one sequence is in a step.
    assert times.tpot_s == pytest.approx(3e-3, rel=1e-6)
    assert times.later_ttft_s == pytest.approx(50 / 2 - 0.3, rel=1e-6)
    # Three replicas bring six a second: n = 0.6 * (2 + n), so n = 3 and a step takes 5 ms.
    times = apart_times(50, 100, 3, 1, 0.5, lambda num: 2e-3 + 1e-3 * num)
    assert times.tpot_s == pytest.approx(5e-3, rel=1e-6)
    assert times.later_ttft_s == pytest.approx(50 / 6 - 0.5, rel=1e-6)

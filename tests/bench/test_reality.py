"""What a real fleet and its twin have in common: the tokens of a load, the device of slow steps, the figures."""

import numpy as np
import pytest

from bench.paced_rank import UNIT, device_s, paced_costs
from bench.reality_fleet import Seen
from bench.reality_load import PREFIX_TOKENS, fitted, poisson_load, spell
from bench.reality_report import compare, figures_of_real
from engine.batch import SequenceStep, StepBatch
from simulator.fleet_spec import SloSection
from simulator.traces.trace import Run, TracedRequest, expand


def num_common(one, other) -> int:
    """Tokens that two prompts begin with together."""
    differ = np.flatnonzero(np.array(one[: len(other)]) != np.array(other[: len(one)]))
    return int(differ[0]) if len(differ) else min(len(one), len(other))


def test_prompts_are_spelt_alike_where_the_twin_knows_them_to_be_alike():
    load = poisson_load(60, 5.0, seed=1)
    spelt = [spell(one.prompt, 4096, 1) for one in load]
    twins = [expand(one.prompt) for one in load]
    assert all(0 <= token < 4096 for prompt in spelt for token in prompt)
    assert [len(prompt) for prompt in spelt] == [one.num_prompt_tokens for one in load]
    common = {(i, j): num_common(twins[i], twins[j]) for i in range(60) for j in range(i)}
    assert set(common.values()) == {0, PREFIX_TOKENS}
    for (i, j), num in common.items():
        assert num <= num_common(spelt[i], spelt[j]) < num + 4  # by chance a token more
    assert load == poisson_load(60, 5.0, seed=1) != poisson_load(60, 5.0, seed=2)
    assert max(num_common(prompt, spell(one.prompt, 4096, 2)) for prompt, one in zip(spelt, load, strict=True)) < 4


def test_a_recorded_trace_shrinks_to_the_model_and_keeps_what_is_common():
    long = TracedRequest("a", 100.0, (Run(1, 512, 4), Run(9, 1952)), (Run(9, 96),))
    short = TracedRequest("b", 103.0, (Run(1, 512, 2), Run(8, 10)), (Run(8, 1),))
    first, second = fitted([long, short], 1024, 2.0)
    assert (first.arrival_s, second.arrival_s) == (0.0, 0.5)
    assert 0.97 * 1024 < first.num_prompt_tokens + first.num_output_tokens <= 1024
    assert num_common(expand(first.prompt), expand(second.prompt)) == 2 * int(512 * 1023 / 4096)
    assert second.num_output_tokens == 1


def test_a_paced_step_takes_what_its_tokens_cost():
    batch = StepBatch((SequenceStep(tuple(range(30)), 10, (), None), SequenceStep((1,), 99, (), None)))
    pairs = 30 * 10 + 30 * 31 / 2
    chunk_s = UNIT.chunk_s + 31 * UNIT.token_s + pairs * UNIT.pair_s + 100 * UNIT.beside_s
    assert device_s(paced_costs(2.0), batch) == pytest.approx(2 * chunk_s)
    decoding = StepBatch((SequenceStep((1,), 99, (), None),))
    assert device_s(UNIT, decoding) == pytest.approx(UNIT.step_s + UNIT.sequence_s + 100 * UNIT.context_s)


def test_figures_are_of_what_clients_saw_and_ratios_tell_who_is_slower():
    requests = [TracedRequest(f"{i}", float(i), (Run(1, 100),), (Run(2, 3),)) for i in range(4)]
    seen = [
        Seen(one, [one.arrival_s + 0.1, one.arrival_s + 0.12, one.arrival_s + 0.16], 40, "", True) for one in requests
    ]
    seen[3] = Seen(requests[3], [3.9], error="PeerLost")
    real = figures_of_real(seen, SloSection(ttft_s=0.2, tpot_s=0.05))
    assert real["completed"] == 3 and real["goodput /s"] == 1.0
    assert real["TTFT p50 ms"] == pytest.approx(0.1) and real["TPOT p99 ms"] == pytest.approx(0.03)
    assert real["ITL p99 ms"] == pytest.approx(0.04, rel=0.005)
    assert (real["cache hits"], real["local prefill"]) == (pytest.approx(0.4), 0.0)
    slower = {name: 1.2 * value for name, value in real.items()}
    compared = compare([real, real, real], [real, slower, real])
    assert compared.ratios == dict.fromkeys(real, 1.0)
    assert compared.num_within == len(real)
    assert compare([real, real, slower], [real] * 3).real_spread["TTFT p50 ms"] == pytest.approx((1.0, 1.2))
    assert compare([real], [slower]).num_within == 1  # none is local in either

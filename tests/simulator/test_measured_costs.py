"""Costs that are fitted to the samples of a fleet: what made the samples is found again, spread and outliers too."""

from random import Random

import numpy as np
import pytest

from cluster.scheduler.step_costs import StepCosts, num_pairs
from core.messages.to_scheduler import StepSample
from simulator.cost.cost_model import StepWork
from simulator.cost.measured_costs import MeasuredCosts, fit, fit_steps

TRUE = StepCosts(0.012, 3e-4, 2e-7, 1e-6, 0.008, 6e-4, 5e-7)


def noisy_steps(num: int, chance: Random, noise: float, outliers: float = 0.0) -> list[StepSample]:
    """Half of them with a chunk; a share of outliers took ten times as long."""
    samples = []
    for number in range(num):
        num_decoding = chance.randrange(1, 17)
        num_kv_tokens = num_decoding * chance.randrange(50, 900)
        factor = chance.lognormvariate(0.0, noise) * (10 if chance.random() < outliers else 1)
        if number % 2:
            num_tokens = chance.randrange(20, 512)
            pairs = int(num_pairs(num_tokens, chance.randrange(0, 1000)))
            features = 1, num_tokens + num_decoding, pairs, num_kv_tokens
            seconds = sum(c * x for c, x in zip(TRUE.of_chunks, features, strict=True))
            samples.append((num_tokens, pairs, num_decoding, num_kv_tokens, factor * seconds))
        else:
            samples.append(
                (0, 0, num_decoding, num_kv_tokens, factor * TRUE.decode_step_s(num_decoding, num_kv_tokens))
            )
    return samples


@pytest.mark.parametrize(("noise", "outliers", "within"), [(0.0, 0.0, 1e-6), (0.05, 0.0, 0.05), (0.05, 0.03, 0.08)])
def test_a_fit_finds_what_made_the_samples(noise, outliers, within):
    found = fit_steps(noisy_steps(3000, Random(1), noise, outliers)).costs
    for name in ("chunk_s", "token_s", "pair_s", "step_s", "sequence_s", "context_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=within), name


def test_many_steps_have_the_mean_and_the_tails_of_the_samples():
    samples = noisy_steps(4000, Random(2), 0.1, 0.03)
    costs = fit_steps(samples)
    decodes = [sample for sample in samples if not sample[0]]
    simulated = [costs.step_s(StepWork((), sample[2], sample[3] - sample[2])) for sample in decodes]
    measured = [sample[4] for sample in decodes]
    assert np.mean(simulated) == pytest.approx(np.mean(measured), rel=0.05)
    for share, within in ((0.5, 0.05), (0.9, 0.05), (0.99, 0.15)):
        assert np.quantile(simulated, share) == pytest.approx(np.quantile(measured, share), rel=within)
    without = MeasuredCosts(costs.costs)
    assert np.quantile([without.step_s(StepWork((), s[2], s[3])) for s in decodes], 0.99) < 0.3 * max(simulated)


def test_steps_that_only_decode_take_the_same_to_the_bit_one_by_one_and_all_at_once():
    costs = fit_steps(noisy_steps(2000, Random(3), 0.2))
    for num_decoding in (1, 7, 64, 1000):
        contexts = np.arange(num_decoding, 2_000_000, 9973, dtype=np.int64)
        together = costs.decode_steps_s(num_decoding, contexts).tolist()
        assert together == [costs.step_s(StepWork((), num_decoding, int(context))) for context in contexts]
    assert len(set(together)) > 150  # a spread, not a line


def test_a_chunk_counts_its_tokens_and_those_that_they_see():
    costs = MeasuredCosts(TRUE)
    work = StepWork(((100, 50), (20, 0)), num_decoding=3, num_kv_tokens=600)
    pairs = 100 * 50 + 100 * 101 // 2 + 20 * 21 // 2
    assert costs.step_s(work) == pytest.approx(0.012 + 3e-4 * 123 + 2e-7 * pairs + 1e-6 * 603)


def test_what_never_varied_or_would_be_negative_is_left_out():
    coefficients, ratios = fit([(1, x, 0) for x in range(1, 40)], [0.5 - 0.001 * x for x in range(1, 40)])
    assert coefficients[1:] == (0.0, 0.0)
    assert coefficients[0] == pytest.approx(0.48, rel=0.03)
    assert min(ratios) < 1 < max(ratios)


def test_a_replica_that_only_prefills_or_only_decodes_gets_costs_and_too_few_samples_none():
    samples = noisy_steps(400, Random(4), 0.02)
    prompts = [(tokens, pairs, 0, 0, seconds) for tokens, pairs, _, _, seconds in samples if tokens]
    alone = fit_steps(prompts)
    assert alone.costs.step_s == alone.costs.chunk_s and alone.costs.sequence_s == alone.costs.token_s
    decodes = fit_steps([sample for sample in samples if not sample[0]])
    assert decodes.step_s(StepWork(((64, 0),))) > decodes.step_s(StepWork((), 1, 64))
    with pytest.raises(ValueError, match="3 steps with prompts and 4 without"):
        fit_steps(samples[:7])

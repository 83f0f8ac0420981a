"""The sampler's distribution, its filters, and the independence of its random numbers from everything but the key."""

import pytest
import torch

from engine.batch import Draw
from engine.sampler import draw_tokens, exponential_noise, logprobs_on_host
from engine.step_inputs import DrawAt

VOCAB = 50
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


def draws(count: int, **changes: object) -> list[DrawAt]:
    """`count` draws of one request at successive positions."""
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 11} | changes
    return [DrawAt(i, Draw(**settings), position=100 + i) for i in range(count)]


def frequencies(at: list[DrawAt]) -> torch.Tensor:
    tokens = draw_tokens(LOGITS.expand(len(at), -1).clone(), at).token_ids
    return tokens.bincount(minlength=VOCAB) / len(at)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("by_seed", [False, True])
def test_draws_follow_the_softmax(temperature: float, by_seed: bool):
    count = 20_000
    at = draws(count, temperature=temperature)
    if by_seed:  # one position, many seeds
        at = [DrawAt(i, Draw(temperature, 1.0, 0, seed=i), position=9) for i in range(count)]
    exact = (LOGITS / temperature).softmax(-1)
    chi_square = float(((frequencies(at) - exact) ** 2 / exact).sum()) * count
    assert chi_square < 85.4  # 99.9th percentile for 49 degrees of freedom


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_temperature_that_float32_can_hardly_hold_is_greedy(temperature: float, top_k: int):
    at = draws(20, temperature=temperature, top_k=top_k)
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    assert draw_tokens(logits.clone(), at).token_ids.tolist() == logits.argmax(-1).tolist()


def test_successive_tokens_are_uncorrelated():
    noise = exponential_noise(draws(2000), torch.empty(1, VOCAB))
    assert abs(float(noise.mean()) - 1.0) < 0.015 and abs(float(noise.var()) - 1.0) < 0.04
    flat = noise.flatten() - 1
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.015  # neighbouring token ids
    assert abs(float(((noise[1:] - 1) * (noise[:-1] - 1)).mean())) < 0.015  # neighbouring positions


def test_known_random_numbers():
    """The stream of SplitMix64 from state mix(mix(seed) + position): changing it would break resumed requests."""
    noise = exponential_noise([DrawAt(0, Draw(1.0, 1.0, 0, seed=0), position=0)], torch.empty(1, 3))
    state, expected = 0, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        expected.append(((z ^ (z >> 31)) >> 41) / 2**23 + 2**-24)
    assert expected[0] == (0xE220A8397B1DCDAF >> 41) / 2**23 + 2**-24  # the generator's published first output
    assert torch.allclose(noise[0], -torch.tensor(expected, dtype=torch.float64).log().float(), rtol=1e-6)


def test_a_draw_depends_on_nothing_but_its_row():
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(2))
    kinds = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5, "temperature": 1.3}]
    at = [
        DrawAt(i, Draw(**{"temperature": 0.9, "top_p": 1.0, "top_k": 0, "seed": i} | kinds[i % 5]), i)
        for i in range(40)
    ]
    together = draw_tokens(logits.clone(), at).token_ids.tolist()
    alone = [int(draw_tokens(logits[i : i + 1].clone(), at[i : i + 1]).token_ids) for i in range(40)]
    backwards = draw_tokens(logits.flip(0), at[::-1]).token_ids.flip(0).tolist()
    assert together == alone == backwards
    assert together[1::5] == logits[1::5].argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_top_k_keeps_the_k_best(top_k: int):
    seen = frequencies(draws(5000, top_k=top_k, temperature=3.0)).nonzero().flatten().tolist()
    best = LOGITS.topk(top_k).indices.tolist()
    assert set(seen) == set(best)


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p: float):
    values, order = LOGITS.softmax(-1).sort(descending=True)
    size = int((values.cumsum(-1) < top_p).sum()) + 1
    seen = frequencies(draws(20_000, top_p=top_p))
    assert set(seen.nonzero().flatten().tolist()) == set(order[:size].tolist())
    exact = values[:size] / values[:size].sum()
    assert float((seen[order[:size]] - exact).abs().sum()) / 2 < 0.015


def test_top_p_counts_the_mass_that_top_k_and_temperature_leave():
    scaled = (LOGITS / 2.0).topk(10)
    probabilities = scaled.values.softmax(-1)
    size = int((probabilities.cumsum(-1) < 0.6).sum()) + 1
    seen = frequencies(draws(5000, top_k=10, top_p=0.6, temperature=2.0))
    assert set(seen.nonzero().flatten().tolist()) == set(scaled.indices[:size].tolist())


def test_tiny_top_p_is_greedy():
    assert frequencies(draws(100, top_p=1e-9))[LOGITS.argmax()] == 1.0


def test_logprobs_are_of_the_unscaled_distribution():
    at = [
        DrawAt(0, Draw(0.5, 0.9, 3, 1, num_logprobs=2), 5),
        DrawAt(1, Draw(0.0, 1.0, 0, 1), 5),
        DrawAt(2, Draw(0.0, 1.0, 0, 1, num_logprobs=0), 5),
    ]
    drawn = draw_tokens(LOGITS.expand(3, -1).clone(), at)
    exact = LOGITS.double().log_softmax(-1)
    first, none, greedy = logprobs_on_host(drawn, drawn.tensors(), at)
    assert none is None and first is not None and greedy is not None
    assert first.logprob == pytest.approx(float(exact[drawn.token_ids[0]]), abs=1e-5)
    assert [token for token, _ in first.top] == exact.topk(2).indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(exact.topk(2).values.tolist(), abs=1e-5)
    assert greedy.top == () and greedy.logprob == pytest.approx(float(exact.max()), abs=1e-5)

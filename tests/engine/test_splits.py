"""However a model is split between ranks, it draws the tokens of one."""

from pathlib import Path

import pytest
import torch

from engine import weights
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine.plain_engine import PlainEngine, greedy, make_runner
from tests.engine.rank_threads import rank_threads

PROMPTS = [[(7 * i + j) % 384 for j in range(length)] for i, length in enumerate((1, 16, 33, 130))]
SAMPLING = [greedy(12)] * len(PROMPTS)


def draw(runner) -> list[list[int]]:
    return [sequence.output for sequence in PlainEngine(runner, max_num_batched_tokens=50).generate(PROMPTS, SAMPLING)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def alone(request, tmp_path_factory) -> tuple[Path, list[list[int]]]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    runner = make_runner(checkpoint, num_blocks=512)
    return checkpoint, draw(runner)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_draw_what_one_draws(alone, size):
    checkpoint, expected = alone
    with rank_threads(checkpoint, size) as runner:
        assert draw(runner) == expected


@pytest.mark.parametrize("family", list(FAMILIES))
def test_eight_ranks_draw_what_one_draws_with_fewer_kv_heads_than_ranks(tmp_path, family):
    kv_heads = 8 if family.startswith("deepseek") else 2  # latents are whole on each rank
    checkpoint = make_checkpoint(tmp_path, family, num_attention_heads=8, num_key_value_heads=kv_heads)
    expected = draw(make_runner(checkpoint, num_blocks=512))
    with rank_threads(checkpoint, 8) as runner:
        assert draw(runner) == expected


@pytest.mark.parametrize("alone", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_whole_experts_draw_what_one_draws(alone, size):
    checkpoint, expected = alone
    with rank_threads(checkpoint, size, whole_experts=True) as runner:
        assert draw(runner) == expected


@pytest.mark.parametrize("alone", ["mixtral", "qwen3_moe"], indirect=True)
def test_stacked_experts_draw_the_same_and_can_be_lent(alone, monkeypatch):
    checkpoint, expected = alone
    apart = make_runner(checkpoint, num_blocks=512)
    monkeypatch.setattr(weights, "multiplies_in_groups", lambda _device: True)
    stacked = make_runner(checkpoint, num_blocks=512)
    assert draw(stacked) == expected
    for ours, theirs in zip(stacked.weights.parameters, apart.weights.parameters, strict=True):
        assert torch.equal(ours(), theirs())

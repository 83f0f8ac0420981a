"""The engine's tokens are those of transformers, however they are batched, chunked or cached."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine.plain_engine import PlainEngine, greedy, make_runner
from tests.engine.rank_threads import rank_threads

NUM_PROMPTS, NUM_TOKENS = 32, 48
TIE = 1e-4


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shard_size = "200KB" if request.param == "llama" else "5GB"
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, shard_size=shard_size)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    lengths = [1, 2, 15, 16, 17, 32, 700] + [int(700 ** rng.random()) for _ in range(NUM_PROMPTS - 7)]
    return [[rng.randrange(8, 384) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuation by transformers, cut where its two best logits nearly tie."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    by_index: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    num_ties = 0
    for start in range(0, len(order), 8):
        members = order[start : start + 8]
        width = max(len(prompts[i]) for i in members)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in members])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in members])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0,
                eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        best = torch.stack(out.logits, dim=1).topk(2).values  # [members, tokens, 2]
        for row, index in enumerate(members):
            tied = (best[row, :, 0] - best[row, :, 1] < TIE).nonzero()
            length = int(tied[0]) if len(tied) else NUM_TOKENS
            num_ties += len(tied) > 0
            by_index[index] = out.sequences[row, width : width + length].tolist()
    print(f"{checkpoint.name}: {num_ties} of {len(prompts)} prompts end early at a near tie")
    assert num_ties < len(prompts) // 8
    return [by_index[index] for index in range(len(prompts))]


def outputs(engine: PlainEngine, prompts: list[list[int]], expected: list[list[int]]) -> list[list[int]]:
    """The engine's greedy tokens as far as they are expected."""
    sequences = engine.generate(prompts, [greedy(NUM_TOKENS)] * len(prompts))
    return [sequence.output[: len(tokens)] for sequence, tokens in zip(sequences, expected, strict=True)]


def test_outputs_are_not_degenerate(expected: list[list[int]]):
    assert len({token for tokens in expected for token in tokens}) > 60


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(16, 2048), (1, 2048), (8, 37)])
def test_greedy_tokens_equal_transformers(checkpoint, prompts, expected, max_num_seqs, max_num_batched_tokens):
    runner = make_runner(checkpoint)
    engine = PlainEngine(runner, max_num_seqs, max_num_batched_tokens)
    assert outputs(engine, prompts, expected) == expected
    runner.close()


def test_tokens_are_the_same_without_a_compiler(checkpoint, prompts, expected, monkeypatch):
    monkeypatch.setattr("engine.backend.load_cpu_library", lambda: None)
    runner = make_runner(checkpoint)
    assert outputs(PlainEngine(runner), prompts, expected) == expected
    runner.close()


def test_prefix_hits_change_nothing(checkpoint, prompts, expected):
    runner = make_runner(checkpoint)
    engine = PlainEngine(runner, max_num_batched_tokens=256)
    assert outputs(engine, prompts, expected) == expected
    assert engine.num_cached_tokens == 0
    assert outputs(engine, prompts, expected) == expected
    assert engine.num_cached_tokens == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts)
    runner.close()


@pytest.mark.parametrize(("size", "stages"), [(1, 2), (1, 3), (2, 2)])
def test_stages_of_a_pipeline_change_nothing(checkpoint, prompts, expected, size, stages):
    with rank_threads(checkpoint, size, stages=stages) as runner:
        assert outputs(PlainEngine(runner, max_num_batched_tokens=256), prompts, expected) == expected

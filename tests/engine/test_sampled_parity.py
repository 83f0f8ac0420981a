"""Seeded sampling and logprobs through the whole engine."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import PlainEngine, greedy, make_runner
from tests.engine.two_ranks import two_ranks

rng = random.Random(8)
PROMPTS = [[rng.randrange(384) for _ in range(int(300 ** rng.random()))] for _ in range(24)]
SAMPLING = [
    SamplingParams(32, temperature=0.7 + 0.02 * i, top_p=1.0 - 0.1 * (i % 3), top_k=(0, 0, 50)[i % 3], seed=1000 + i)
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")


def test_sampled_tokens_depend_on_seed_and_position_alone(checkpoint: Path):
    runner = make_runner(checkpoint)
    alone = [s.output for s in PlainEngine(runner, max_num_seqs=1).generate(PROMPTS, SAMPLING)]
    engine = PlainEngine(runner, max_num_seqs=24)
    batched = [s.output for s in engine.generate(PROMPTS, SAMPLING)]
    hit = [s.output for s in engine.generate(PROMPTS, SAMPLING)]
    resumed = engine.generate(
        [prompt + output[:13] for prompt, output in zip(PROMPTS, alone, strict=True)],
        [SamplingParams(19, s.temperature, s.top_p, s.top_k, s.seed) for s in SAMPLING],
    )
    chunked = [s.output for s in PlainEngine(runner, 9, 29).generate(PROMPTS[::-1], SAMPLING[::-1])][::-1]
    with two_ranks(checkpoint) as (leader, _):
        split = [s.output for s in PlainEngine(leader, 16).generate(PROMPTS, SAMPLING)]
    runner.close()
    assert engine.num_cached_tokens > 500
    assert batched == alone and hit == alone and chunked == alone and split == alone
    assert [output[:13] + s.output for output, s in zip(alone, resumed, strict=True)] == alone
    assert len({tuple(output) for output in alone}) == len(PROMPTS)


def test_logprobs_equal_those_of_transformers(checkpoint: Path):
    runner = make_runner(checkpoint)
    sampling = [SamplingParams(8, temperature=1.5, seed=3, num_logprobs=4), greedy(8, num_logprobs=1), greedy(8)]
    prompts = PROMPTS[:3]
    sequences = PlainEngine(runner).generate(prompts, sampling)
    runner.close()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for prompt, sequence in zip(prompts[:2], sequences[:2], strict=True):
        with torch.no_grad():
            exact = model(torch.tensor([prompt + sequence.output])).logits[0].log_softmax(-1)
        for i, (token, found) in enumerate(zip(sequence.output, sequence.logprobs, strict=True)):
            row = exact[len(prompt) - 1 + i]
            assert found is not None
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(len(found.top))
            assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [t for t, _ in found.top] == best.indices.tolist()
    assert sequences[2].logprobs == [None] * 8

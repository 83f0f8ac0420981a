"""Models whose layers see windows, in caches that hold windows alone: tokens of transformers, with and without hits."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import BLOCK_SIZE, PlainEngine, greedy, make_runner
from tests.fleet.oracle import are_greedy

CHUNK, NUM_TOKENS = 64, 40
FAMILIES = ["mistral", "phi3", "gemma2", "gemma3", "gpt_oss"]


def prompt_of(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(8, 384) for _ in range(length)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """(checkpoint, transformers model)."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    return checkpoint, loaded.eval()


def output(engine: PlainEngine, prompt: list[int]) -> list[int]:
    (sequence,) = engine.generate([prompt], [greedy(NUM_TOKENS)])
    return sequence.output


def test_a_cache_of_full_layers_and_windows_is_enough(model):
    """Of three layers, those without a window alone would fill it."""
    checkpoint, oracle = model
    prompt = prompt_of(1, 900)
    runner = make_runner(checkpoint, num_blocks=1 << 12)
    layout = runner.layout
    runner.close()
    num_blocks = layout.num_blocks_held(len(prompt) + NUM_TOKENS, CHUNK)
    num_full = sum(group.window is None for group in layout.kv_groups)
    num_logical = layout.num_blocks_for(len(prompt) + NUM_TOKENS)
    assert num_blocks == num_full * num_logical + 8 * (len(layout.kv_groups) - num_full)
    assert num_blocks < 0.5 * len(layout.kv_groups) * num_logical
    runner = make_runner(checkpoint, num_blocks=num_blocks)
    runner.kv_cache.tensor.fill_(50.0)  # what was never written must not be seen
    engine = PlainEngine(runner, max_num_batched_tokens=CHUNK)
    assert are_greedy(oracle, prompt, output(engine, prompt))
    assert engine.most_held <= num_blocks
    runner.close()


def test_a_cached_prefix_gives_the_same_tokens_where_only_its_window_is_left(model):
    checkpoint, oracle = model
    first, more = prompt_of(2, 500), prompt_of(3, 70)
    runner = make_runner(checkpoint, num_blocks=1 << 12)
    layout = runner.layout
    runner.close()
    runner = make_runner(checkpoint, num_blocks=layout.num_blocks_held(700, CHUNK))
    engine = PlainEngine(runner, max_num_batched_tokens=CHUNK)
    shown = output(engine, first)
    assert engine.num_cached_tokens == 0 and are_greedy(oracle, first, shown)
    turn = first + shown + more
    answer = output(engine, turn)
    assert engine.num_cached_tokens == (len(first) + NUM_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE == 528
    assert are_greedy(oracle, turn, answer)
    runner.close()


def test_many_at_a_time_in_one_small_cache(model):
    checkpoint, oracle = model
    common = prompt_of(4, 200)
    prompts = [common[: 40 * i] + prompt_of(5 + i, 60 + 30 * i) for i in range(6)]
    runner = make_runner(checkpoint, num_blocks=150)
    engine = PlainEngine(runner, max_num_seqs=3, max_num_batched_tokens=CHUNK)
    for _ in range(2):
        sequences = engine.generate(prompts, [greedy(NUM_TOKENS)] * len(prompts))
        for prompt, sequence in zip(prompts, sequences, strict=True):
            assert are_greedy(oracle, prompt, sequence.output)
    assert engine.num_cached_tokens > 0
    runner.close()

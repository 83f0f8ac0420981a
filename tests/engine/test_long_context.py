"""A prompt far longer than a step's budget needs no more memory than the budget and its KV."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

BUDGET = 512
KV_BYTES_PER_TOKEN = 2 * 16 * 4  # one layer, one head of 16 numbers in fp32
MEASURE = f"""
import resource, sys
from pathlib import Path
from core.sampling import SamplingParams
from tests.engine.plain_engine import BLOCK_SIZE, PlainEngine, greedy, make_runner
checkpoint, length = Path(sys.argv[1]), int(sys.argv[2])
runner = make_runner(checkpoint, num_blocks=length // BLOCK_SIZE + 2)
runner.kv_cache.tensor.zero_()
prompt = [i * 7919 % 383 for i in range(length)]
engine = PlainEngine(runner, 1, {BUDGET})
engine.generate([prompt[:{BUDGET}]], [greedy(2)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(sequence,) = engine.generate([prompt], [greedy(2)])
print(len(sequence.output), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def growth_bytes(checkpoint: Path, length: int) -> int:
    """Of the process's peak, above what a prompt of one step needs."""
    run = [sys.executable, "-c", MEASURE, str(checkpoint), str(length)]
    told = subprocess.run(run, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    num_tokens, growth_kib = map(int, told.split())
    assert num_tokens == 2
    return growth_kib << 10


def checkpoint_of(folder: Path) -> Path:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 16}
    return make_checkpoint(folder, "llama", max_position_embeddings=1 << 18, head_dim=16, **sizes)


def limit_bytes(length: int) -> int:
    """Gathered keys and values of one layer, a transposed copy, and scores of some rows with their softmax."""
    return 4 * length * KV_BYTES_PER_TOKEN + 3 * 4 * max(1 << 24, 8 * length)


def test_a_prompt_of_32_budgets(tmp_path: Path):
    length = 32 * BUDGET
    assert growth_bytes(checkpoint_of(tmp_path), length) < 3 * 4 * 128 * length + 4 * length * KV_BYTES_PER_TOKEN


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_prompt_of_128k_tokens(tmp_path: Path):
    length = 128 << 10
    assert growth_bytes(checkpoint_of(tmp_path), length) < limit_bytes(length)

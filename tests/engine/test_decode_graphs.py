"""Decode steps of fixed sizes: the same tokens as without, from memory that a graph could be replayed over."""

import random
from pathlib import Path

import pytest
import torch

from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import PlainEngine, greedy, make_runner
from tests.engine.rank_threads import rank_threads
from tests.engine.replays import Replay, StrictReplay, plain_flashinfer_backend

SIZES = (1, 2, 4)
GREEDY = Draw(0.0, 1.0, 0, 0)
DENSE = ["llama", "gemma2", "gemma3", "qwen3", "phi3"]
MIXTURES = ["gpt_oss", "deepseek_v2", "deepseek_v3"]


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(8, 384) for _ in range(length)] for length in (3, 60, 16, 1, 33)]


def outputs(runner: ModelRunner) -> list[list[int]]:
    """At most four at a time, in chunks: steps of one to four tokens among mixed ones."""
    engine = PlainEngine(runner, max_num_seqs=4, max_num_batched_tokens=24)
    sequences = engine.generate(prompts(), [greedy(length) for length in (6, 3, 7, 5, 4)])
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("family", DENSE + MIXTURES)
def test_tokens_are_those_of_torch(tmp_path: Path, family: str):
    checkpoint = make_checkpoint(tmp_path, family)
    plain = make_runner(checkpoint, num_blocks=64)
    expected = outputs(plain)
    assert len({token for tokens in expected for token in tokens}) > 8
    plain.close()
    record = Replay if family in MIXTURES else StrictReplay
    runner = make_runner(checkpoint, num_blocks=64, make_backend=plain_flashinfer_backend(SIZES, record))
    assert outputs(runner) == expected
    runner.close()


def test_ranks_record_and_replay_alike(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path, "llama")
    plain = make_runner(checkpoint, num_blocks=64)
    expected = outputs(plain)
    plain.close()
    with rank_threads(checkpoint, 2, make_backend=plain_flashinfer_backend(SIZES, Replay)) as runner:
        assert outputs(runner) == expected


@pytest.fixture
def runner(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path, "llama")
    runner = make_runner(checkpoint, num_blocks=16, make_backend=plain_flashinfer_backend(SIZES))
    yield runner
    runner.close()


def decode(block: int, position: int) -> SequenceStep:
    return SequenceStep((9 + block,), position, (BlockTable((block,)),), GREEDY)


def run(runner: ModelRunner, *steps: SequenceStep) -> tuple[int | None, ...]:
    return runner.collect(runner.launch(StepBatch(steps))).token_ids


def test_rows_that_fill_a_size_up_write_to_the_spare_block_alone(runner: ModelRunner):
    assert runner.num_blocks == 15 and runner.kv_cache.tensor.shape[1] == 16
    for _ in range(2):  # computed as it goes, then replayed
        runner.kv_cache.tensor.fill_(5.0)
        run(runner, decode(7, 3), decode(2, 0), decode(11, 9))
        touched = (runner.kv_cache.tensor != 5.0).any(dim=0).any(dim=1).any(dim=1).any(dim=-1)
        assert touched.nonzero().tolist() == [[2, 0], [7, 3], [11, 9], [15, 0]]


def test_a_size_serves_every_batch_that_fits(runner: ModelRunner):
    runner.kv_cache.tensor.normal_(generator=torch.Generator().manual_seed(0))
    steps = [decode(block, 3 * block + 1) for block in range(4)]
    alone = [run(runner, step)[0] for step in steps]
    assert len(set(alone)) > 1
    assert [run(runner, step)[0] for step in steps] == alone
    for order in ([0, 1, 2], [3, 0, 1, 2], [2, 0], [1, 3, 2], [3, 1, 0, 2]):
        assert run(runner, *(steps[i] for i in order)) == tuple(alone[i] for i in order)


def test_warm_up_records_every_size_once(runner: ModelRunner):
    runner.warm_up(20)
    graphs = runner._graphs
    assert graphs is not None and sorted(graphs._made) == list(SIZES)
    recordings = {size: made.recording for size, made in graphs._made.items()}
    run(runner, decode(0, 0), decode(1, 5))
    run(runner, decode(0, 1), decode(1, 6), decode(2, 0))
    assert {size: made.recording for size, made in graphs._made.items()} == recordings
    assert [recordings[size].num_replays for size in SIZES] == [1, 1, 1]


def test_steps_that_do_not_fit_run_as_they_come(runner: ModelRunner):
    steps = [decode(block, 0) for block in range(5)]
    assert not runner._graphs.fits(StepBatch(tuple(steps)))
    assert not runner._graphs.fits(StepBatch((decode(0, 0), SequenceStep((8, 9), 0, (BlockTable((1,)),), GREEDY))))
    assert None not in run(runner, *steps)


def test_layers_are_announced_after_a_replay(runner: ModelRunner):
    announced = []
    for _ in range(2):
        step = runner.launch(StepBatch((decode(0, 0),)), lambda *layers: announced.append(layers), (2, 1))
        runner.collect(step)
    assert announced == [(0, 2), (2, 1)] * 2

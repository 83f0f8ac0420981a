"""Steps, layer announcements and the KV cache's memory."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from core.errors import ConfigurationError
from core.kv_layout import KVLayout
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.kv_cache import KVCache, decide_num_blocks
from engine.runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import CPU, make_runner

GREEDY = Draw(0.0, 1.0, 0, 0)


@pytest.fixture
def runner(tmp_path: Path):
    runner = make_runner(make_checkpoint(tmp_path, "llama"), num_blocks=16)
    yield runner
    runner.close()


def prompt_step(length: int, blocks: tuple[int, ...], draw: Draw | None = GREEDY) -> SequenceStep:
    return SequenceStep(tuple(range(8, 8 + length)), 0, (BlockTable(blocks),), draw)


@pytest.mark.parametrize(
    ("layer_groups", "calls"),
    [((1, 1, 1), [(0, 1), (1, 1), (2, 1)]), ((2, 1), [(0, 2), (2, 1)]), ((1, 2), [(0, 1), (1, 2)]), ((3,), [(0, 3)])],
)
def test_layers_are_announced_when_written_and_before_later_ones(
    runner: ModelRunner, layer_groups: tuple[int, ...], calls: list[tuple[int, int]]
):
    announced = []

    def on_layers(first: int, count: int) -> None:
        announced.append((first, count))
        written = runner.kv_cache.tensor[:, [3, 1]].abs().sum(dim=(1, 2, 3, 5)) > 0  # [layers, 2 slots of 16]
        assert written[: first + count, :16].all()
        assert not written[first + count :].any()

    runner.collect(runner.launch(StepBatch((prompt_step(32, (3, 1)),)), on_layers, layer_groups))
    assert announced == calls


def test_only_the_named_blocks_are_written(runner: ModelRunner):
    runner.kv_cache.tensor.fill_(5.0)
    runner.collect(runner.launch(StepBatch((prompt_step(20, (7, 2)), prompt_step(1, (11,))))))
    touched = (runner.kv_cache.tensor != 5.0).any(dim=0).any(dim=1).any(dim=1).any(dim=-1)  # [blocks, slots]
    assert touched.nonzero()[:, 0].unique().tolist() == [2, 7, 11]
    assert touched.sum(dim=1)[[2, 7, 11]].tolist() == [4, 16, 1]


def test_results_come_in_the_order_of_the_batch(runner: ModelRunner):
    steps = [prompt_step(9, (0,)), prompt_step(1, (1,)), prompt_step(30, (2, 3), None), prompt_step(2, (4,))]
    alone = [runner.collect(runner.launch(StepBatch((step,)))).token_ids[0] for step in steps]
    assert runner.collect(runner.launch(StepBatch(tuple(steps)))).token_ids == tuple(alone)
    assert alone[2] is None and len(set(alone)) > 2


def test_garbage_beyond_a_sequence_is_not_seen(runner: ModelRunner):
    """Slots of reused blocks hold old numbers, however large."""
    batch = StepBatch(
        (prompt_step(1, (5,)), prompt_step(17, (0, 1)), SequenceStep((9,), 3, (BlockTable((8,)),), GREEDY))
    )
    clean = runner.collect(runner.launch(batch)).token_ids
    runner.kv_cache.tensor[:, [5, 0, 1]] = 1e30
    runner.kv_cache.tensor[:, 8, :, :, 4:] = -1e30
    assert runner.collect(runner.launch(batch)).token_ids == clean


def test_warm_up_computes(runner: ModelRunner):
    runner.warm_up()
    assert runner.kv_cache.tensor[:, :2].abs().sum() > 0


def test_the_cache_can_be_mapped_by_another_process_until_closed():
    layout = KVLayout(2, 4, 8, 16, "float32", 2)
    cache = KVCache(layout, 1, 6, CPU)
    assert cache.tensor.shape == (2, 6, 2, 2, 16, 8) and list(cache.heads) == [2, 3]
    cache.tensor[1, 5] = 3.0
    path = cache.path
    assert path is not None
    probe = (
        "import sys, numpy; m = numpy.memmap(sys.argv[1], 'float32', 'r');print(m.size, m.sum(), (m[-512:] == 3).all())"
    )
    seen = subprocess.check_output([sys.executable, "-c", probe, str(path)], text=True).split()
    assert seen == [str(cache.tensor.numel()), str(numpy.float32(3.0 * 512)), "True"]
    cache.close()
    cache.close()
    assert not path.exists()


def test_a_killed_process_leaves_no_shared_memory():
    code = (
        "import os, torch; from core.kv_layout import KVLayout; from engine.kv_cache import KVCache;"
        "c = KVCache(KVLayout(1, 1, 8, 16, 'float32', 1), 0, 4, torch.device('cpu'));"
        "print(c.path.exists(), c.path, flush=True); os.kill(os.getpid(), 9)"
    )
    existed, path = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert existed == "True" and not Path(path).exists()


def test_more_blocks_than_memory_are_refused():
    with pytest.raises(ConfigurationError, match="no memory"):
        KVCache(KVLayout(32, 8, 128, 16, "bfloat16", 1), 0, 1 << 22, CPU)


def test_number_of_blocks(tmp_path: Path):
    spec = load_model_spec(make_checkpoint(tmp_path, "llama"))
    layout = spec.kv_layout(1, 16)
    assert layout.block_bytes_per_rank == 3 * 16 * 2 * 2 * 16 * 4 == 12288
    assert decide_num_blocks(spec, layout, CPU, 77, 256, 0.9) == 77
    assert decide_num_blocks(spec, layout, CPU, None, 3, 0.9) == (3 << 20) // 12288
    with pytest.raises(ConfigurationError, match="at least 2"):
        decide_num_blocks(spec, spec.kv_layout(1, 1024), CPU, None, 1, 0.9)

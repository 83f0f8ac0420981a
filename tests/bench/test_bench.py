"""The arithmetic of the bounds, and that benchmarks run apart, keep their figures and need Ray only where they say."""

import subprocess
import sys

import pytest

from bench.__main__ import BENCHMARKS, run_one
from bench.gpu import hidden_ray
from bench.handoff import last_piece_bytes
from bench.http import EngineTimes, bound_tokens_per_s, percentile
from bench.report import ROOT
from bench.steps import json_object, run_step, summary
from core.config import PoolConfig, TransferConfig
from core.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=10, num_kv_heads=2, head_dim=8, block_size=16, dtype="bfloat16", tensor_parallel=1)
BYTES_OF_LAYER = 2 * 2 * 8 * 16 * 2  # of one block: K and V, heads, head_dim, tokens, bytes


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"),
    [(16, 1), (17, 2), (64, 4), (65, 1), (100, 3)],
)
def test_the_last_piece_is_the_last_group_of_layers_of_the_last_chunk(num_tokens, num_blocks):
    pool, transfer = PoolConfig(max_num_batched_tokens=64), TransferConfig(layers_per_group=4)
    assert last_piece_bytes(LAYOUT, num_tokens, pool, transfer) == num_blocks * BYTES_OF_LAYER
    coarse = TransferConfig(layers_per_group=4, last_layers_per_group=4)
    assert last_piece_bytes(LAYOUT, num_tokens, pool, coarse) == num_blocks * 2 * BYTES_OF_LAYER
    even = TransferConfig(layers_per_group=5, last_layers_per_group=5)
    assert last_piece_bytes(LAYOUT, num_tokens, pool, even) == num_blocks * 5 * BYTES_OF_LAYER


def test_few_streams_are_bound_by_one_request_and_many_by_their_prefills():
    times = EngineTimes(prefill_s=0.5, step_s=0.1)
    assert bound_tokens_per_s(times, num_streams=2, num_output=6, num_prefills=1) == pytest.approx(12 / 1.0)
    assert bound_tokens_per_s(times, num_streams=10, num_output=6, num_prefills=1) == pytest.approx(60 / 5.0)
    assert bound_tokens_per_s(times, num_streams=10, num_output=6, num_prefills=2) == pytest.approx(60 / 2.5)


def test_percentiles_are_values_that_were_seen():
    values = list(range(200, 0, -1))
    assert [percentile(values, percent) for percent in (1, 50, 99, 100)] == [2, 100, 198, 200]
    assert percentile([3.0], 99) == 3.0


def test_a_step_shows_its_output_and_keeps_its_json(capsys):
    good = run_step("good", ["json.tool", "--help"])
    assert (good.status, good.found) == (0, None)
    assert "usage" in good.output
    assert "usage" in capsys.readouterr().out
    bad = run_step("bad", ["bench.handoff", "--device", "abacus"])
    assert summary([good, bad])["bad"]["status"] == 2
    assert json_object('{"a": 1}\n') == {"a": 1}
    assert json_object("{not json") is None


def test_what_runs_on_a_gpu_machine_imports_without_ray():
    modules = (
        "bench.gpu, bench.engine, bench.handoff, bench.overlap, bench.slow_rank, bench.kv_transfer, "
        "prefill_worker.__main__, decode_worker.__main__"
    )
    with hidden_ray() as environment:

        def run(statement: str) -> int:
            command = [sys.executable, "-c", statement]
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode

        assert run("import ray") == 1
        assert run(f"import {modules}") == 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_tells_its_bound_and_its_options(name):
    told = subprocess.run([sys.executable, "-m", "bench", name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0
    assert "bound" in told.stdout.lower()


def test_an_unknown_benchmark_is_refused_by_name():
    with pytest.raises(SystemExit, match="nonsense"):
        run_one("nonsense")

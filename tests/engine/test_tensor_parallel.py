"""Two real processes compute what one does, and notice when the other is gone."""

from pathlib import Path

import pytest

from core.errors import ConfigurationError, PeerLost
from core.kv_layout import KVLayout
from core.sampling import SamplingParams
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.batch_codec import decode_batch, encode_batch
from engine.checkpoint import load_model_spec
from engine.rank_links import connect_ranks
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import CPU, PlainEngine, greedy, make_runner
from tests.engine.two_ranks import LOST, STOPPED, free_address, two_ranks

PROMPTS = [[(7 * i + j) % 384 for j in range(length)] for i, length in enumerate((1, 15, 16, 33, 90, 260))]
SAMPLING = [greedy(24), SamplingParams(24, 0.8, 0.9, 40, seed=3, num_logprobs=2)] * 3


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", {}), ("qwen2", {"num_key_value_heads": 1}), ("qwen3", {"vocab_size": 383})]
)
def test_two_ranks_draw_what_one_draws(tmp_path: Path, name: str, changes: dict[str, int]):
    checkpoint = make_checkpoint(tmp_path, name, **changes)
    alone = make_runner(checkpoint)
    expected = [s.output for s in PlainEngine(alone, max_num_batched_tokens=100).generate(PROMPTS, SAMPLING)]
    alone.close()
    with two_ranks(checkpoint) as (runner, follower):
        runner.keep_alive()
        sequences = PlainEngine(runner, max_num_batched_tokens=100).generate(PROMPTS, SAMPLING)
    assert [s.output for s in sequences] == expected
    assert sequences[1].logprobs[0] is not None and len(sequences[1].logprobs[0].top) == 2
    assert follower.exitcode == STOPPED


def test_a_dead_follower_is_noticed_by_the_leader(tmp_path: Path):
    with two_ranks(make_checkpoint(tmp_path, "llama")) as (runner, follower):
        follower.kill()
        follower.join()
        with pytest.raises(PeerLost):
            PlainEngine(runner).generate(PROMPTS, SAMPLING)
        runner.close()


def test_a_silent_leader_is_noticed_by_the_follower(tmp_path: Path):
    with two_ranks(make_checkpoint(tmp_path, "llama"), max_silence_s=0.3) as (_, follower):
        follower.join(20)
        assert follower.exitcode == LOST


@pytest.mark.parametrize("degrees", [{"tensor_parallel": 2}, {"tensor_parallel": 1, "pipeline_parallel": 2}])
def test_a_rank_that_never_comes_is_an_error(degrees: dict[str, int]):
    layout = KVLayout(2, 2, 8, 16, "float32", **degrees)
    with pytest.raises(PeerLost, match="rank 0 of 2"):
        connect_ranks(free_address(), 0, layout, CPU, timeout_s=0.5)


def test_splits_that_do_not_fit_are_refused(tmp_path: Path):
    spec = load_model_spec(make_checkpoint(tmp_path, "llama"))
    with pytest.raises(ConfigurationError, match="must divide 4 attention heads"):
        spec.kv_layout(3, 16)
    assert spec.kv_layout(4, 16).heads_per_rank == 1


def test_batches_survive_the_broadcast_bit_for_bit():
    batch = StepBatch(
        (
            SequenceStep(
                (5, 6, 7), 32, (BlockTable((9, 1, 4)), BlockTable((2,), 2)), Draw(0.1 + 0.2, 0.95, 7, 2**63 - 1, 0)
            ),
            SequenceStep((1,) * 2000, 0, (BlockTable(tuple(range(130))),), None),
            SequenceStep((3,), 4, (BlockTable((0,)),), Draw(0.0, 1.0, 0, 0, None)),
        )
    )
    assert decode_batch(encode_batch(batch)) == batch

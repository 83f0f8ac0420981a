"""Stages of a pipeline, as real processes: each holds its own layers, steps follow each other through them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigurationError, PeerLost
from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from core.model_geometry import read_geometry
from core.sampling import SamplingParams
from engine.backend import torch_backend
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.model_parameters import Share, list_parameters
from engine.pipeline import SingleStage
from engine.stage_reports import await_drawn, await_reports
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import BLOCK_SIZE, PlainEngine, greedy, make_runner
from tests.engine.rank_threads import rank_threads
from tests.engine.two_ranks import LOST, STAGES, STOPPED, ranks, two_ranks

PROMPTS = [[(7 * i + j) % 384 for j in range(length)] for i, length in enumerate((1, 15, 16, 33, 90, 260))]
SAMPLING = [greedy(24), SamplingParams(24, 0.8, 0.9, 40, seed=3, num_logprobs=2)] * 2 + [
    SamplingParams(24, 0.7, seed=4, num_logprobs=0),
    greedy(24, num_logprobs=3),
]


def draw(runner) -> list[tuple[list[int], list]]:
    sequences = PlainEngine(runner, max_num_batched_tokens=100).generate(PROMPTS, SAMPLING)
    return [(sequence.output, sequence.logprobs) for sequence in sequences]


def draw_alone(checkpoint: Path) -> list[tuple[list[int], list]]:
    alone = make_runner(checkpoint)
    drawn = draw(alone)
    alone.close()
    return drawn


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_two_stages_draw_what_one_draws(tmp_path: Path, name: str):
    """Logprobs as well, which come from the last stage; of qwen2 the embedding is the head, too."""
    checkpoint = make_checkpoint(tmp_path, name)
    with two_ranks(checkpoint, degrees=STAGES) as (runner, follower):
        runner.keep_alive()
        assert draw(runner) == draw_alone(checkpoint)
        runner.keep_alive()
    assert follower.exitcode == STOPPED


@pytest.mark.parametrize("degrees", [(2, 2), (1, 3)])
def test_more_ranks_draw_what_one_draws(tmp_path: Path, degrees: tuple[int, int]):
    """Two stages of two ranks each; three stages."""
    checkpoint = make_checkpoint(tmp_path, "llama")
    with ranks(checkpoint, degrees) as (runner, followers):
        runner.keep_alive()
        assert [tokens for tokens, _ in draw(runner)] == [tokens for tokens, _ in draw_alone(checkpoint)]
    assert {follower.exitcode for follower in followers} == {STOPPED}


def chunks_of(prompt: list[int], size: int) -> list[StepBatch]:
    table = (BlockTable(tuple(range(-(-len(prompt) // BLOCK_SIZE)))),)
    drawn = Draw(0.0, 1.0, 0, 0)
    return [
        StepBatch(
            (
                SequenceStep(
                    tuple(prompt[first : first + size]), first, table, drawn if first + size >= len(prompt) else None
                ),
            )
        )
        for first in range(0, len(prompt), size)
    ]


def test_chunks_follow_each_other_through_the_stages(tmp_path: Path):
    """All are launched before the first is collected: a stage does not wait for the next one to take what it sends."""
    checkpoint, prompt = make_checkpoint(tmp_path, "llama"), PROMPTS[-1]
    expected = draw_alone(checkpoint)[-1][0][0]
    with two_ranks(checkpoint, degrees=STAGES) as (runner, _):
        launched = [runner.launch(batch) for batch in chunks_of(prompt, 64)]
        results = [runner.collect(step).token_ids for step in launched]
    assert results == [(None,)] * 4 + [(expected,)]


def test_layer_groups_are_told_in_order_those_of_later_stages_when_collected(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path, "llama", num_hidden_layers=5)  # stages of 3 and 2 layers
    with two_ranks(checkpoint, degrees=STAGES) as (runner, _):
        for batch in chunks_of(PROMPTS[-1], 130):
            told: list[tuple[int, int]] = []
            step = runner.launch(batch, lambda first, number, told=told: told.append((first, number)), (2, 2, 1))
            assert told == [(0, 2)], "the second group ends on the second stage"
            runner.collect(step)
            assert told == [(0, 2), (2, 2), (4, 1)]


class Reporting(SingleStage):
    """Later stages that report what is in `notices`."""

    num_stages = 3

    def __init__(self, notices: list[tuple[int, list[int]]]) -> None:
        self.notices, self.events = notices, list[tuple[str, int]]()

    def reported(self, stage, tensors) -> None:
        for tensor in tensors:
            expected, notice = self.notices.pop(0)
            assert stage == expected
            tensor.copy_(torch.tensor(notice))
            self.events.append(("reported", stage))


def test_nothing_is_told_of_a_later_stage_before_that_has_reported_it():
    """Stages of 2 layers; the first group ends on the first stage, two on the second, none on the last."""
    layout = KVLayout(6, 2, 8, 16, "float32", 1, pipeline_parallel=3)
    pipeline = Reporting([(1, [0, 3]), (1, [0, 4]), (2, [1, 0])])
    await_reports(pipeline, layout, {2: 2, 3: 1, 4: 1}, lambda first, _: pipeline.events.append(("told", first)))
    assert pipeline.events == [("reported", 1), ("told", 2), ("reported", 1), ("told", 3)]
    assert await_drawn(pipeline, ()) is None and pipeline.notices == []


@pytest.mark.parametrize("idle", [False, True])
def test_a_dead_stage_is_noticed_by_the_leader(tmp_path: Path, idle: bool):
    with two_ranks(make_checkpoint(tmp_path, "llama"), degrees=STAGES) as (runner, follower):
        follower.kill()
        follower.join()
        with pytest.raises(PeerLost, match="stage is lost"):
            if idle:
                runner.keep_alive()
            else:
                PlainEngine(runner).generate(PROMPTS, SAMPLING)
        runner.close()


def test_a_stage_that_dies_with_a_step_in_flight_is_noticed(tmp_path: Path):
    with two_ranks(make_checkpoint(tmp_path, "llama"), degrees=STAGES) as (runner, follower):
        draw(runner)
        step = runner.launch(chunks_of(PROMPTS[-1], 260)[0])
        follower.kill()
        with pytest.raises(PeerLost, match="stage is lost"):
            for _ in range(2):  # the first may have been over before
                runner.collect(step)
        runner.close()


def test_the_death_of_a_later_stage_is_passed_on_to_the_leader(tmp_path: Path):
    with ranks(make_checkpoint(tmp_path, "llama"), (1, 3)) as (runner, (second, third)):
        third.kill()
        third.join()
        runner.keep_alive()  # the second stage passes it on, and ends
        second.join(20)
        assert second.exitcode == LOST
        with pytest.raises(PeerLost, match="stage is lost"):
            runner.keep_alive()
        runner.close()


def test_a_silent_leader_is_noticed_by_the_next_stage(tmp_path: Path):
    with two_ranks(make_checkpoint(tmp_path, "llama"), max_silence_s=0.3, degrees=STAGES) as (_, follower):
        follower.join(20)
        assert follower.exitcode == LOST


def test_more_stages_than_layers_are_refused(tmp_path: Path):
    spec = load_model_spec(make_checkpoint(tmp_path, "llama"))
    with pytest.raises(ConfigurationError, match="pipeline_parallel 4 is above the 3 layers") as raised:
        spec.kv_layout(1, 16, 4)
    assert raised.value.field == "pipeline_parallel"
    assert spec.kv_layout(1, 16, 3).num_ranks == 3


def owners(spec, layout: KVLayout, rank: int) -> set[str]:
    names = (parameter.name for parameter in list_parameters(spec, Share(rank, layout)))
    return {".".join(name.split(".")[:2]) if name.startswith("layers.") else name for name in names}


@pytest.mark.parametrize(("name", "head"), [("llama", {"head"}), ("qwen2", {"embedding"})])
def test_a_stage_loads_its_layers_alone(tmp_path: Path, name: str, head: set[str]):
    spec = load_model_spec(make_checkpoint(tmp_path, name))
    layout = spec.kv_layout(2, 16, 2)
    for part in (0, 1):
        assert owners(spec, layout, part) == {"embedding", "layers.0", "layers.1"}
        assert owners(spec, layout, 2 + part) == {"layers.2", "final_norm"} | head


def test_the_parts_of_all_ranks_are_the_whole_model(tmp_path: Path):
    """Every stored number is on some rank, and counted on the rank that has most of them."""
    spec = load_model_spec(make_checkpoint(tmp_path, "deepseek_v3"))
    geometry = read_geometry(tmp_path)
    whole = {
        part.name for parameter in list_parameters(spec, Share(0, spec.kv_layout(1, 16))) for part in parameter.parts
    }
    for stages in (2, 3):
        layout = spec.kv_layout(1, 16, stages)
        lists = [list_parameters(spec, Share(rank, layout)) for rank in range(stages)]
        assert {part.name for parameters in lists for parameter in parameters for part in parameter.parts} == whole
        held = [
            sum(parameter.num_bytes("float32") for parameter in parameters if len(parameter.shape) > 1)
            for parameters in lists
        ]
        assert [4 * geometry.num_parameters_of_stage(layout, stage) for stage in range(stages)] == held
        assert geometry.weight_bytes_per_rank(layout) == max(held)


def test_a_pool_has_room_for_the_layers_of_a_stage():
    plain = KVLayout(5, 2, 8, 16, "float32", 1, pipeline_parallel=2)
    assert [plain.layers_of_stage(stage) for stage in (0, 1)] == [range(3), range(3, 5)]
    assert plain.places_per_rank == 3 and plain.block_bytes == 5 * 2 * 2 * 16 * 8 * 4
    assert plain.block_bytes_per_rank == plain.block_bytes * 3 // 5
    grouped = replace(plain, groups=(KVGroup((2, 4)), KVGroup((0, 1, 3), 40)))
    assert [group.layers for group in grouped.groups_of_stage(0)] == [(2,), (0, 1)]
    assert [group.layers for group in grouped.groups_of_stage(1)] == [(4,), (3,)]
    assert grouped.places_per_rank == 2 and grouped.num_places == 3


@pytest.mark.parametrize("degree", [(1, 2), (2, 2)])
def test_stages_whose_weights_stream_in_draw_the_same(tmp_path: Path, degree: tuple[int, int]):
    """Weights beyond a budget pass through the device by layers, on every stage those of its own."""
    checkpoint = make_checkpoint(tmp_path, "llama", num_hidden_layers=8)
    expected = [tokens for tokens, _ in draw_alone(checkpoint)]
    size, stages = degree

    def backend(layout: KVLayout):
        return replace(torch_backend(layout, may_compile=False), device_weight_bytes=520_000 // size)

    with rank_threads(checkpoint, size, stages=stages, make_backend=backend) as runner:
        assert runner.weights.stream is not None
        assert [tokens for tokens, _ in draw(runner)] == expected

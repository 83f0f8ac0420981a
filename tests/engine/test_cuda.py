"""On a CUDA device: FlashInfer's kernels against torch, graphs against launches, streamed weights, nothing that waits.

These run nowhere else; what they call is tested on a CPU by test_flashinfer_attention, test_decode_graphs and
test_weight_stream.
"""

import importlib.util
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.engine import what_waits
from core.engine_config import EngineConfig
from core.kv_groups import KVGroup
from engine.attention import TorchAttention
from engine.attention_math import AttentionRule
from engine.backend import choose_backend
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.flashinfer_attention import FlashInferAttention
from engine.flashinfer_kernels import FlashInferKernels
from engine.flashinfer_latents import FlashInferLatentAttention
from engine.flashinfer_library import find_flashinfer
from engine.kernels import Norm, TorchKernels
from engine.latent_attention import LatentAttention
from engine.latent_up import LatentUp
from engine.rank_links import RankLinks
from engine.rope import inverse_frequencies
from engine.rope_spec import Rope
from engine.runner import ModelRunner
from engine.step_inputs import StepInputs, lay_out
from tests.checkpoints import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_flashinfer = pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="no flashinfer")

CUDA = torch.device("cuda")
BLOCK_SIZE, NUM_BLOCKS = 16, 256
MIXED = [(1, 37), (70, 0), (1, 300), (33, 100), (3, 17), (1, 0)]  # (tokens, first position)
DECODE = [(1, 0), (1, 16), (1, 50), (1, 511)]
RULES = {
    "plain": AttentionRule(0.1),
    "window": AttentionRule(0.1, window=40),
    "soft cap": AttentionRule(0.3, softcap=3.0),
}


def steps_of(sizes: list[tuple[int, int]]) -> StepInputs:
    blocks = list(range(NUM_BLOCKS))
    random.Random(0).shuffle(blocks)
    sequences = []
    for num_tokens, first in sizes:
        table = tuple(blocks.pop() for _ in range(-(-(first + num_tokens) // BLOCK_SIZE)))
        sequences.append(SequenceStep((1,) * num_tokens, first, (BlockTable(table),), None))
    return lay_out(StepBatch(tuple(sequences)), CUDA)


def all_layers(window: int | None) -> tuple[KVGroup, ...]:
    return (KVGroup((0, 1), window),)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA).bfloat16()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=3e-2, atol=3e-2)


@needs_flashinfer
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (24, 4)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sizes", [DECODE, MIXED], ids=["decode", "mixed"])
def test_attention(sizes, head_dim, heads, rule):
    inputs, (num_query, num_kv) = steps_of(sizes), heads
    rows = normal(len(inputs.token_ids), num_query + 2 * num_kv, head_dim).split((num_query, num_kv, num_kv), dim=1)
    theirs, ours = (normal(2, NUM_BLOCKS, 2, num_kv, BLOCK_SIZE, head_dim, seed=2) for _ in range(2))
    expected = TorchAttention(theirs, all_layers(rule.window)).plan(inputs).attend(1, *rows, rule)
    close(
        FlashInferAttention(find_flashinfer(), ours, all_layers(rule.window)).plan(inputs).attend(1, *rows, rule),
        expected,
    )
    assert torch.equal(ours, theirs)


@needs_flashinfer
@pytest.mark.parametrize("window", [None, 40])
def test_attention_with_sinks(window: int | None):
    inputs = steps_of(MIXED)
    rows = normal(len(inputs.token_ids), 80, 64).split((64, 8, 8), dim=1)
    rule = AttentionRule(0.1, window=window, sinks=normal(64, seed=3))
    theirs, ours = (normal(1, NUM_BLOCKS, 2, 8, BLOCK_SIZE, 64, seed=2) for _ in range(2))
    expected = TorchAttention(theirs, all_layers(rule.window)).plan(inputs).attend(0, *rows, rule)
    close(
        FlashInferAttention(find_flashinfer(), ours, all_layers(rule.window)).plan(inputs).attend(0, *rows, rule),
        expected,
    )


@needs_flashinfer
def test_attention_over_latents():
    inputs = steps_of(MIXED)
    up = LatentUp(normal(16, 256, 512, seed=4) * 0.05, 128)
    query, latent = normal(len(inputs.token_ids), 16, 192), normal(len(inputs.token_ids), 1, 576, seed=5)
    rule = AttentionRule(0.07, up=up)
    theirs, ours = (normal(1, NUM_BLOCKS, 1, 1, BLOCK_SIZE, 576, seed=2) for _ in range(2))
    expected = LatentAttention(theirs, all_layers(None)).plan(inputs).attend(0, query, latent, latent[..., :512], rule)
    step = FlashInferLatentAttention(find_flashinfer(), ours, all_layers(None)).plan(inputs)
    close(step.attend(0, query, latent, latent[..., :512], rule), expected)
    assert torch.equal(ours, theirs)


@needs_flashinfer
@pytest.mark.parametrize("has_offset", [False, True])
def test_norms(has_offset: bool):
    stored, x, residual = normal(256), normal(40, 256, seed=2), normal(40, 256, seed=3)
    norm = Norm(stored, stored.float() + 1 if has_offset else stored, has_offset, 1e-6)
    ours, theirs = FlashInferKernels(find_flashinfer()), TorchKernels()
    close(ours.norm(x, norm), theirs.norm(x, norm))
    heads = normal(40, 6, 256, seed=4)[:, 1:5]
    close(ours.norm(heads, norm), theirs.norm(heads, norm))
    for found, expected in zip(
        ours.add_norm(residual.clone(), x.clone(), norm), theirs.add_norm(residual, x, norm), strict=True
    ):
        close(found, expected)


@needs_flashinfer
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [64, 128])
def test_rotations(rotated: int, interleaved: bool):
    rope = Rope(1e4, rotated, magnitude=1.2, interleaved=interleaved)
    positions, frequencies = torch.arange(0, 4000, 100, device=CUDA), inverse_frequencies(rope).to(CUDA)
    results = []
    for kernels in (FlashInferKernels(find_flashinfer()), TorchKernels()):
        angles = kernels.angles(positions, frequencies, rope, torch.bfloat16)
        results.append(kernels.rotate(normal(40, 12, 128)[:, :10], angles, interleaved=interleaved))
    close(*results)


@needs_flashinfer
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_swiglu"])
def test_activations(activation):
    gate_up = normal(40, 512)
    ours, theirs = FlashInferKernels(find_flashinfer()), TorchKernels()
    close(ours.activate(gate_up, activation), theirs.activate(gate_up, activation))


SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6, "head_dim": 64, "dtype": "bfloat16"}
DRAW = Draw(0.0, 1.0, 0, 0, num_logprobs=2)


def make_runner(folder: Path, config: EngineConfig) -> ModelRunner:
    spec = load_model_spec(folder, "bfloat16")
    layout = spec.kv_layout(1, BLOCK_SIZE)
    backend = choose_backend(config, spec, layout, CUDA, 8)
    read = CheckpointReader(folder, spec, CUDA).read
    return ModelRunner(spec, read, layout, NUM_BLOCKS, RankLinks(), CUDA, 1, backend=backend)


def logprobs(runner: ModelRunner) -> Tensor:
    """Of two rounds over prompts and then steps of single tokens, which are forced, so that all runners do the same."""
    found = []
    lengths = (40, 7, 130)
    blocks, groups = iter(range(NUM_BLOCKS)), runner.layout.kv_groups
    tables = [tuple(BlockTable(tuple(islice(blocks, 20))) for _ in groups) for _ in lengths]
    for _ in range(2):
        prompts = (
            SequenceStep(tuple(range(8, 8 + n)), 0, table, DRAW) for n, table in zip(lengths, tables, strict=True)
        )
        batches = [StepBatch(tuple(prompts))]
        for step in range(20):
            singles = zip(lengths, tables, strict=True)
            batches.append(StepBatch(tuple(SequenceStep((9 + step,), n + step, table, DRAW) for n, table in singles)))
        for batch in batches:
            result = runner.collect(runner.launch(batch))
            found += [[value for _, value in told.top] for told in result.logprobs if told is not None]
    runner.close()
    return torch.tensor(found)


PLAIN = EngineConfig(attention="torch", kernels="torch", graph_batch_sizes=())
WAYS = {
    "flashinfer": EngineConfig(attention="flashinfer", kernels="flashinfer", graph_batch_sizes=()),
    "graphs": EngineConfig(attention="flashinfer", kernels="flashinfer"),
    "streamed": PLAIN.model_copy(update={"device_weights_mib": 3}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_every_way_computes_the_same(tmp_path: Path, family: str, way: str):
    if way != "streamed":
        pytest.importorskip("flashinfer")
    changes = SMALL | ({"layer_types": ["sliding_attention", "full_attention"] * 3} if family == "gemma3" else {})
    folder = make_checkpoint(tmp_path, family, **changes)
    expected, runner = logprobs(make_runner(folder, PLAIN)), make_runner(folder, WAYS[way])
    assert (runner.weights.stream is not None) == (way == "streamed")
    assert (runner._graphs is not None) == (way == "graphs")
    assert (logprobs(runner) - expected).abs().median() < 0.02


@pytest.mark.parametrize("way", [PLAIN, *WAYS.values()], ids=["torch", *WAYS])
def test_no_launch_waits_for_the_device(tmp_path: Path, way: EngineConfig):
    if "flashinfer" in (way.attention, way.kernels):
        pytest.importorskip("flashinfer")
    runner = make_runner(make_checkpoint(tmp_path, "llama", **SMALL), way)
    runner.warm_up()
    assert what_waits(runner) == ""
    runner.close()

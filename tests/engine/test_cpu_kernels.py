"""What is compiled for CPUs computes what torch does."""

from dataclasses import replace

import pytest
import torch

from core.kv_groups import KVGroup
from engine.attention import TorchAttention
from engine.attention_math import AttentionRule
from engine.batch import BlockTable, SequenceStep, StepBatch
from engine.cpu_attention import CpuAttention
from engine.cpu_kernels import CpuKernels
from engine.cpu_library import CpuLibrary, load_cpu_library
from engine.kernels import Norm, TorchKernels
from engine.rope_spec import Rope
from engine.step_inputs import lay_out

CPU = torch.device("cpu")
TORCH = TorchKernels()
ROWS = [1, 3, 200]  # the last in several threads


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    found = load_cpu_library()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.fixture
def kernels(library) -> CpuKernels:
    return CpuKernels(library)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_norms(kernels, rows):
    x, residual = random(rows, 300), random(rows, 300, seed=1)
    norm = Norm(torch.empty(0), random(300, seed=2), False, 1e-5)
    assert_close(kernels.norm(x, norm), TORCH.norm(x, norm))
    heads = random(rows, 7, 32)[:, 2:5]
    of_head = replace(norm, weight=norm.weight[:32].clone())
    assert_close(kernels.norm(heads, of_head), TORCH.norm(heads, of_head))
    total, normed = TORCH.add_norm(residual, x, norm)
    got_total, got_normed = kernels.add_norm(residual.clone(), x, norm)
    assert_close(got_total, total)
    assert_close(got_normed, normed)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations(kernels, rows, activation):
    gate_up = random(rows, 2 * 300) * 30
    assert_close(kernels.activate(gate_up, activation), TORCH.activate(gate_up, activation))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rotated", [32, 20])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_leave_values_alone(kernels, rows, rotated, interleaved):
    rope = Rope(theta=10000.0, rotated=rotated, interleaved=interleaved)
    frequencies = 10000.0 ** -(torch.arange(rotated // 2) / (rotated // 2))
    angles = kernels.angles(torch.arange(rows) * 7, frequencies, rope, torch.float32)
    qkv = random(rows, 9, 32)
    expected = TORCH.rotate(qkv[:, :6].clone(), angles, interleaved=interleaved)
    before = qkv[:, 6:].clone()
    assert_close(kernels.rotate(qkv[:, :6], angles, interleaved=interleaved), expected)
    assert torch.equal(qkv[:, 6:], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule",
    [AttentionRule(0.2), AttentionRule(0.2, window=9), AttentionRule(0.2, softcap=1.5, sinks=random(6))],
    ids=["plain", "window", "softcap and sinks"],
)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attention_over_blocks_that_lie_anywhere(library, monkeypatch, dtype, rule, num_kv_heads):
    monkeypatch.setattr(
        "engine.attention_math.product_dtype", lambda _device, _dtype: torch.float32
    )  # as compiled code
    blocks = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    contexts = [0, 3, 4, 40, 130]
    sequences = [SequenceStep((1,), context, (BlockTable(tuple(blocks[10 * i : 10 * i + 9])),), None)
                 for i, context in enumerate(contexts)]  # fmt: skip
    chunk = SequenceStep((1,) * 21, 17, (BlockTable(tuple(blocks[50:53])),), None)
    inputs = lay_out(StepBatch((*sequences, chunk)), CPU)
    num_rows = len(inputs.token_ids)
    query, qkv = random(num_rows, 6, 32), random(num_rows, 2 * num_kv_heads, 32, seed=5)
    key, value = qkv[:, :num_kv_heads], qkv[:, num_kv_heads:]
    filled = random(2, 60, 2, num_kv_heads, 16, 32, seed=9).to(dtype)
    caches, groups = [filled.clone(), filled.clone()], (KVGroup((0, 1), rule.window),)
    expected, got = (
        backend.plan(inputs).attend(1, query, key, value, rule)
        for backend in (TorchAttention(caches[0], groups), CpuAttention(library, caches[1], groups))
    )
    assert torch.equal(*caches)
    assert not torch.equal(caches[0][1], filled[1]) and torch.equal(caches[0][0], filled[0])
    assert_close(got[:5], expected[:5])
    tolerance = 1e-2 if library.multiplies_pairs and dtype == torch.bfloat16 else 2e-6  # of the chunk
    torch.testing.assert_close(got[5:], expected[5:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("first", "rows"), [(0, 1000), (5, 37), (250, 13), (777, 24)])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(
    "rule",
    [AttentionRule(0.125), AttentionRule(0.125, window=40), AttentionRule(0.125, 300, 2.0, random(6))],
    ids=["plain", "short window", "long window, softcap and sinks"],
)
def test_chunks_attend_as_in_float64_but_for_weights_in_bfloat16(library, first, rows, head_dim, rule):
    """Blocks behind the window are given back: what others write there, were it no number, is never seen."""
    if not library.multiplies_pairs:
        pytest.skip("no pairs of bfloat16 here")
    context, kv_heads = first + rows, 2
    num_blocks = -(-context // 16)
    physical = (torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)) + 1).tolist()
    given_back = 0 if rule.window is None else max(0, first - rule.window + 1) // 16
    cache = random(1, num_blocks + 1, 2, kv_heads, 16, head_dim, seed=9).bfloat16()
    cache[:, [0, *physical[:given_back]]] = float("nan")
    table = BlockTable(tuple(physical[given_back:]), given_back)
    inputs = lay_out(StepBatch((SequenceStep((1,) * rows, first, (table,), None),)), CPU)
    query = (random(rows, 6, head_dim) * 3).bfloat16().float()  # times the scale it is not rounded again
    own = random(rows, 2 * kv_heads, head_dim, seed=5)
    step = CpuAttention(library, cache, (KVGroup((0,), rule.window),)).plan(inputs)
    got = step.attend(0, query, own[:, :kv_heads], own[:, kv_heads:], rule).view(rows, 6, head_dim)
    planes = cache[0, physical].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :context].double()
    keys, values = planes.nan_to_num().repeat_interleave(3, dim=1)
    scores = torch.einsum("rqd,qcd->qrc", query.double(), keys) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * (scores / rule.softcap).tanh()
    distance = torch.arange(first, context)[:, None] - torch.arange(context)
    scores.masked_fill_((distance < 0) | (distance >= (rule.window or context)), float("-inf"))
    sinks = (
        torch.full((6, rows, 1), float("-inf")) if rule.sinks is None else rule.sinks.view(6, 1, 1).expand(6, rows, 1)
    )
    weights = torch.cat((scores, sinks.double()), dim=-1).softmax(-1)[..., :context]
    expected = torch.einsum("qrc,qcd->rqd", weights, values)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)

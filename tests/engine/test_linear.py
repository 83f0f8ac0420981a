"""Products in every precision, as the CPU has it or must emulate it, against float64."""

from pathlib import Path

import pytest
import torch

from engine import attention_math, matrix
from engine.arithmetic import arithmetic_dtype, product_dtype
from engine.cpu_library import load_cpu_library
from engine.half_matrix import HalfMatrix, pack_halves
from engine.linear import Linear
from engine.mlp import Mlp
from engine.panel_matrix import PanelMatrix

CPU = torch.device("cpu")
needs_fbgemm = pytest.mark.skipif(torch.backends.quantized.engine not in ("fbgemm", "x86"), reason="no FBGEMM here")
ROWS = [1, 2, 3, 4, 5, 16, 63, 65, 400]  # of 300 inputs: more than are taken together


def rounds_rows() -> bool:
    """Whether compiled products take rows in bfloat16."""
    library = matrix.load_cpu_library()
    return library is not None and library.multiplies_pairs


@pytest.fixture(params=["as the CPU computes", "widened", "widened without a compiler"])
def precision(request, monkeypatch) -> str:
    """Every machine takes both ways: widening is forced where the CPU would not need it."""
    if request.param.endswith("a compiler"):
        monkeypatch.setattr(matrix, "load_cpu_library", lambda: None)
    if request.param.startswith("widened"):
        for module, name in ((matrix, "arithmetic_dtype"), (attention_math, "product_dtype")):
            monkeypatch.setattr(module, name, lambda _device, _dtype: torch.float32)
    return request.param


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_that_of_float64_but_for_one_rounding(dtype, rows, with_bias):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(5000, 300, generator=generator).to(dtype) / 16
    bias = torch.randn(5000, generator=generator).to(dtype) if with_bias else None
    arithmetic = matrix.arithmetic_dtype(CPU, dtype)
    x = torch.randn(rows, 300, generator=generator).to(arithmetic)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    got = Linear(weight.clone(), bias)(x)
    assert got.dtype == arithmetic and got.shape == (rows, 5000)
    rounded = torch.bfloat16 if dtype == torch.bfloat16 and rounds_rows() else arithmetic
    tolerance = 2 * torch.finfo(rounded).eps
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance + 1e-5)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap", "has_sinks"), [(None, None, False), (23, None, True), (150, 3.0, False)])
def test_attention_is_that_of_float64_but_for_rounding(dtype, window, softcap, has_sinks):
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(*shape, generator=generator).to(dtype)
                           for shape in ((150, 6, 32), (2, 170, 32), (2, 170, 32)))  # fmt: skip
    wide_keys, wide_values = (t.double().repeat_interleave(3, dim=0) for t in (keys, values))
    scores = torch.einsum("rqd,qcd->qrc", query.double(), wide_keys) / 32**0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    unseen = torch.ones(150, 170, dtype=torch.bool).triu_(21)
    if window is not None:
        unseen |= torch.ones(150, 170, dtype=torch.bool).tril_(20 - window)
    sinks = torch.randn(6, generator=generator).to(dtype) if has_sinks else None
    scores = scores.masked_fill(unseen, float("-inf"))
    columns = torch.zeros(6, 150, 0) if sinks is None else sinks.double().view(6, 1, 1).expand(6, 150, 1)
    weights = torch.cat((scores, columns), dim=-1).softmax(-1)[..., :170]
    expected = torch.einsum("qrc,qcd->rqd", weights, wide_values)
    rule = attention_math.AttentionRule(32**-0.5, window, softcap, sinks)
    got = attention_math.attend_causal(query, keys, values, rule).view(150, 6, 32)
    last = attention_math.attend_single(query[-1:], keys[None], values[None], unseen[-1].view(1, 1, 1, 170), rule)
    tolerance = 8 * torch.finfo(dtype).eps
    assert got.dtype == last.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last.view(6, 32).double(), expected[-1], rtol=tolerance, atol=tolerance)


def test_only_half_precision_on_a_cpu_without_its_instructions_is_widened():
    assert arithmetic_dtype(CPU, torch.float32) == product_dtype(CPU, torch.float32) == torch.float32
    assert arithmetic_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    flags = Path("/proc/cpuinfo").read_text()
    native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
    assert product_dtype(CPU, torch.bfloat16) == (torch.bfloat16 if native else torch.float32)


def test_rows_that_the_cpu_multiplies_as_bfloat16_are_rounded_to_it_and_to_nothing_less():
    """Also an odd number of inputs, of which the last has no pair."""
    library = load_cpu_library()
    if library is None or not library.multiplies_pairs:
        pytest.skip("no pairs of bfloat16 here")
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs, rows in ((301, 33, 5), (32, 7, 13), (1, 1, 1), (768, 96, 400)):
        weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
        x = torch.randn(rows, inputs, generator=generator)
        panels = PanelMatrix(library, weight, None)
        expected = x.bfloat16().double() @ weight.double().T
        torch.testing.assert_close(panels.multiply(x).double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(panels.rows(), weight)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-12])
def test_the_weight_can_be_had_back_bit_by_bit(dtype, scale):
    weight = (torch.randn(72, 40, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    weight[3, 5] = 1e-7
    assert torch.equal(Linear(weight.clone()).rows(), weight)


@needs_fbgemm
def test_halves_are_packed_unless_float16_would_change_them():
    weight = torch.randn(72, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert isinstance(pack_halves(weight / 64, None), HalfMatrix)
    assert isinstance(pack_halves(weight.half(), None), HalfMatrix)
    for unfit in (weight * 2**17, weight / 2**20, weight.float()):
        assert pack_halves(unfit, None) is None


def test_a_feed_forward_of_many_rows_is_that_of_each():
    generator = torch.Generator().manual_seed(1)
    gate_up, down = torch.randn(96, 32, generator=generator), torch.randn(32, 48, generator=generator)
    mlp = Mlp(Linear(gate_up), Linear(down), lambda rows: rows[:, :48] * rows[:, 48:])
    x = torch.randn(1100, 32, generator=generator)
    expected = torch.cat([mlp(x[first : first + 100]) for first in range(0, 1100, 100)])
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-3)

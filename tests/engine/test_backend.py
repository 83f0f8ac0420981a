"""What a model is computed with: as configured, or by what is there; a wrong choice is told in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.config import parse_config
from core.engine_config import EngineConfig
from core.errors import ConfigurationError
from engine.attention import TorchAttention
from engine.backend import choose_backend
from engine.checkpoint import load_model_spec
from engine.flashinfer_library import why_no_attention, why_no_kernels
from engine.kernels import TorchKernels
from engine.latent_attention import LatentAttention
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import CPU

CUDA = torch.device("cuda")


def test_a_cpu_without_a_compiler_takes_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.backend.load_cpu_library", lambda: None)
    for family, attention in (("llama", TorchAttention), ("deepseek_v3", LatentAttention)):
        spec = load_model_spec(make_checkpoint(tmp_path / family, family))
        backend = choose_backend(EngineConfig(), spec, spec.kv_layout(1, 16), CPU, 8)
        assert (type(backend.kernels), backend.attention) == (TorchKernels, attention)
        assert backend.record is None and backend.graph_sizes == ()


@pytest.mark.parametrize("field", ["attention", "kernels"])
def test_flashinfer_that_cannot_be_is_refused_by_field(tmp_path: Path, field: str):
    spec = load_model_spec(make_checkpoint(tmp_path, "llama"))
    with pytest.raises(ConfigurationError, match=f"engine.{field} flashinfer: it ") as refused:
        choose_backend(EngineConfig(**{field: "flashinfer"}), spec, spec.kv_layout(1, 16), CPU, 8)
    assert refused.value.field == f"engine.{field}"


def test_what_flashinfer_cannot_compute(tmp_path: Path):
    spec = load_model_spec(make_checkpoint(tmp_path / "llama", "llama", head_dim=64))
    layout, half = spec.kv_layout(1, 16), replace(spec, dtype="bfloat16")
    assert why_no_kernels(spec, CUDA) == "it computes bfloat16 and float16, not float32"
    assert why_no_attention(half, layout, CUDA) == why_no_kernels(half, CUDA) == ""
    assert why_no_attention(half, layout, CPU) == "it needs CUDA, not cpu"
    assert why_no_attention(half, replace(layout, head_dim=80), CUDA) == (
        "it computes heads of 64, 128, 256 elements, not 80"
    )
    latents = load_model_spec(make_checkpoint(tmp_path / "deepseek", "deepseek_v3"))
    assert why_no_attention(replace(latents, dtype="bfloat16"), latents.kv_layout(1, 16), CUDA) == (
        "it computes latents of (512, 64) elements, not (32, 16)"
    )


def test_the_ladder_doubles_up_to_what_a_step_can_hold():
    assert EngineConfig().graph_ladder(24) == (1, 2, 4, 8, 16, 24)
    assert EngineConfig().graph_ladder(16) == (1, 2, 4, 8, 16)
    assert EngineConfig(graph_batch_sizes=(3, 12, 40)).graph_ladder(16) == (3, 12)
    assert EngineConfig(graph_batch_sizes=()).graph_ladder(16) == ()


@pytest.mark.parametrize("sizes", [[0, 2], [2, 2], [4, 2]])
def test_a_ladder_that_does_not_ascend_is_refused(sizes: list[int]):
    with pytest.raises(ConfigurationError, match=r"decode\.engine\.graph_batch_sizes: .* must ascend from 1 or more"):
        parse_config({"decode": {"engine": {"graph_batch_sizes": sizes}}})

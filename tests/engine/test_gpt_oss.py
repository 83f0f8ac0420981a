"""gpt-oss as it is published, its experts in MXFP4: read as transformers reads them, whole and in slices."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from core.errors import ConfigurationError
from core.model_geometry import geometry_of, read_geometry
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_parameters import Share, list_parameters
from engine.mxfp4 import dequantise
from engine.parameters import Part
from engine.rope_spec import YarnScaling
from engine.stored_encodings import DECODERS
from tests.checkpoints import make_checkpoint, make_mxfp4_checkpoint
from tests.engine.plain_engine import PlainEngine, greedy, make_runner
from tests.engine.rank_threads import rank_threads

CPU = torch.device("cpu")
INNER = 96  # of an expert: half of it is one block and a half
PUBLISHED_20B = {  # what its config.json says of the model
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mxfp4_checkpoint(tmp_path_factory.mktemp("published"))


def read(folder: Path, share: Share, dtype: str | None = None) -> dict[str, torch.Tensor]:
    spec = load_model_spec(folder, dtype)
    parameters = list_parameters(spec, share)
    tensors = CheckpointReader(folder, spec, CPU).read(parameters)
    return {parameter.name: tensor for parameter, tensor in zip(parameters, tensors, strict=True)}


def test_every_byte_under_every_scale_is_what_transformers_decodes():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    ours = dequantise(blocks, scales)
    assert ours.isfinite().sum() == 253 * 512 + 384 + 256, "the largest scales overflow"
    assert ours[255].isnan().all(), "no scale, by the specification"
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        theirs = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].T
        assert ours[:255].to(dtype).equal(theirs[:255])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_their_slices_of_what_transformers_decodes(published: Path, size, whole_experts, dtype):
    stored = load_file(published / "model.safetensors")
    layout = load_model_spec(published, dtype).kv_layout(size, 16)
    num_experts_seen = 0
    for rank in range(size):
        share = Share(rank, layout, whole_experts)
        held = read(published, share, dtype)
        inner = range(INNER) if whole_experts else share.of(INNER)
        for layer in range(3):
            at = f"model.layers.{layer}.mlp.experts."
            gate_up, down = (
                convert_moe_packed_tensors(
                    stored[f"{at}{name}_blocks"], stored[f"{at}{name}_scales"], dtype=getattr(torch, dtype)
                )
                for name in ("gate_up_proj", "down_proj")
            )
            for expert in share.experts(8):
                gate, up = gate_up[expert, :, 0::2].T, gate_up[expert, :, 1::2].T
                taken = slice(inner.start, inner.stop)
                name = f"layers.{layer}.experts.{expert}."
                assert held[f"{name}gate_up"].equal(torch.cat((gate[taken], up[taken])))
                assert held[f"{name}down"].equal(down[expert].T[:, taken])
                biases = stored[f"{at}gate_up_proj_bias"][expert].to(down.dtype)
                assert held[f"{name}gate_up_bias"].equal(torch.cat((biases[0::2][taken], biases[1::2][taken])))
                assert (f"{name}down_bias" in held) == (whole_experts or rank == 0)
                num_experts_seen += 1
    assert num_experts_seen == 3 * 8 * (1 if whole_experts else size)


def test_only_the_blocks_that_a_rank_needs_are_touched():
    class Stored:
        """A tensor that notes what is taken of it."""

        def __init__(self, name: str) -> None:
            self.name = name

        def get_shape(self) -> list[int]:
            return [8, 64, 3, 16] if self.name.endswith("blocks") else [8, 64, 3]

        def get_dtype(self) -> str:
            return "U8"

        def __getitem__(self, taken: Any) -> torch.Tensor:
            touched[self.name] = taken
            return torch.zeros(self.get_shape(), dtype=torch.uint8)[taken]

    touched: dict[str, Any] = {}
    part = Part("down", (64, INNER), columns=range(48, 96), encoding="mxfp4", expert=5, num_experts=8)
    assert DECODERS[part.encoding](part, Stored).shape == (64, 48) == part.taken
    assert touched == dict.fromkeys(("down_blocks", "down_scales"), (5, slice(None), slice(1, 3, 1)))


def test_greedy_tokens_equal_transformers(published: Path):
    """transformers decodes the same files to float32."""
    model = AutoModelForCausalLM.from_pretrained(
        published,
        dtype=torch.float32,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
    ).eval()
    prompts = [[(7 * i + j * j) % 384 for j in range(length)] for i, length in enumerate((1, 17, 60, 130, 300))]
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        expected.append(out[0, len(prompt) :].tolist())
    assert len({token for tokens in expected for token in tokens}) > 40

    def draw(runner) -> list[list[int]]:
        engine = PlainEngine(runner, max_num_batched_tokens=100)
        return [sequence.output for sequence in engine.generate(prompts, [greedy(24)] * len(prompts))]

    runner = make_runner(published, dtype="float32")
    assert draw(runner) == expected
    runner.close()
    with rank_threads(published, 2, dtype="float32") as runner:
        assert draw(runner) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda scales: scales[:, :, :1], r"has shape \(8, 192, 1\), the config asks \(8, 192, 2\)"),
        (lambda scales: scales[:7], r"has shape \(7, 192, 2\), the config asks \(8, 192, 2\)"),
        (lambda scales: scales.float(), r"holds F32, not the bytes \(U8\) of MXFP4"),
        (None, "the checkpoint has no tensor"),
    ],
)
def test_scales_that_are_cut_misread_or_missing_are_named(tmp_path: Path, change, says: str):
    file = make_mxfp4_checkpoint(tmp_path) / "model.safetensors"
    name, tensors = "model.layers.1.mlp.experts.gate_up_proj_scales", load_file(file)
    scales = tensors.pop(name)
    if change is not None:
        tensors[name] = change(scales).contiguous()
    save_file(tensors, file)
    with pytest.raises(ConfigurationError, match=says) as raised:
        read(tmp_path, Share(0, load_model_spec(tmp_path).kv_layout(1, 16)))
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantised weights (quant_method 'fp8') is not supported; supported is mxfp4",
        ),
        ({"swiglu_limit": 9.0}, "swiglu_alpha, swiglu_limit (1.702, 9.0) must be 1.702, 7.0"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, change: dict[str, Any], says: str):
    file = make_checkpoint(tmp_path, "gpt_oss") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        load_model_spec(tmp_path)


def test_the_published_config_is_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_20B))
    save_file({"none": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = load_model_spec(tmp_path)
    assert (spec.dtype, spec.decoder.layers[0].mlp.fused_encoding, spec.eos_token_ids) == (
        "bfloat16",
        "mxfp4",
        {200002},
    )
    assert [layer.attention.window for layer in spec.decoder.layers] == [128, None] * 12
    (rope,) = {layer.attention.rope for layer in spec.decoder.layers}
    assert (rope.theta, rope.rotated) == (150000.0, 64) and rope.magnitude == pytest.approx(1.3465736)
    assert rope.scaling == YarnScaling(32.0, 32.0, 1.0, 4096, truncate=False)
    assert read_geometry(tmp_path) == spec.geometry
    assert round(spec.num_parameters / 1e9, 1) == 20.9


def test_the_larger_one_has_117_billion_parameters():
    assert (
        round(geometry_of(PUBLISHED_20B | {"num_hidden_layers": 36, "num_local_experts": 128}).num_parameters / 1e9)
        == 117
    )

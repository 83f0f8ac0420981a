"""DeepSeek's checkpoints: weights in blocks of FP8, what stays in float32, and configurations that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from core.errors import ConfigurationError
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.latent_up import LatentUp
from engine.model_parameters import Share, list_parameters
from engine.model_spec import LatentAttentionSpec
from engine.parameters import Part
from engine.rope_spec import yarn_magnitude
from engine.stored_encodings import read_fp8_blocks
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
IN_BLOCKS = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_hidden_layers": 2,
}  # every matrix is of whole blocks, as transformers asks; ranks cut through them
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def in_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix, what is stored of it: FP8 numbers, and a factor per block that makes the largest of them 448."""
    rows, columns = (-(-size // 128) for size in matrix.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = padded.view(rows, 128, columns, 128)
    factors = blocks.abs().amax(dim=(1, 3)) / 448
    numbers = (blocks / factors[:, None, :, None]).view(padded.shape)[: matrix.shape[0], : matrix.shape[1]]
    return numbers.to(torch.float8_e4m3fn).contiguous(), factors


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def fp8_and_plain(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint as V3's is stored, and one that holds the same as transformers dequantises it."""
    fp8, plain = (make_checkpoint(tmp_path / name, "deepseek_v3", **IN_BLOCKS) for name in ("fp8", "plain"))
    stored, dequantised = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if tensor.dim() < 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            stored[name] = dequantised[name] = tensor
            continue
        stored[name], stored[f"{name}_scale_inv"] = in_fp8(tensor)
        parts = {"weight": stored[name], "weight_scale_inv": stored[f"{name}_scale_inv"]}
        dequantised[name] = Fp8Dequantize(None).convert(parts)["weight"]
        assert not dequantised[name].equal(tensor)
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantised, plain / "model.safetensors", metadata={"format": "pt"})
    edit_config(fp8, quantization_config=FP8)
    return fp8, plain


def read(folder: Path, rank: int = 0, size: int = 1, dtype: str | None = None) -> dict[str, Tensor]:
    spec = load_model_spec(folder, dtype)
    parameters = list_parameters(spec, Share(rank, spec.kv_layout(size, 16)))
    tensors = CheckpointReader(folder, spec, CPU).read(parameters)
    return {parameter.name: tensor for parameter, tensor in zip(parameters, tensors, strict=True)}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (2, 4)])
def test_fp8_weights_are_read_as_transformers_dequantises_them(fp8_and_plain, rank, size):
    fp8, plain = (read(folder, rank, size) for folder in fp8_and_plain)
    assert fp8.keys() == plain.keys() and "layers.1.experts.7.down" in fp8
    assert [name for name in fp8 if not fp8[name].equal(plain[name])] == []


class Stored:
    """A tensor of a file, which counts the elements that are read of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.num_read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}[self.tensor.dtype]

    def __getitem__(self, at: tuple[slice, ...]) -> Tensor:
        taken = self.tensor[at]
        self.num_read += taken.numel()
        return taken


@pytest.mark.parametrize(
    ("rows", "columns", "num_blocks"),
    [
        (range(300), range(200), 6),
        (range(100, 140), range(200), 4),
        (range(128, 256), range(128, 200), 1),
        (range(299, 300), range(60, 129), 2),
    ],
)
def test_a_rank_reads_its_part_of_a_matrix_and_the_factors_of_its_blocks(rows, columns, num_blocks):
    """Matrices need not be of whole blocks: the last ones of rows and columns are cut short."""
    numbers, factors = in_fp8(torch.randn(300, 200))
    stored = {"m": Stored(numbers), "m_scale_inv": Stored(factors)}
    got = read_fp8_blocks(Part("m", (300, 200), rows, columns, "fp8_blocks"), stored.__getitem__)
    whole = numbers.float() * factors.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    assert got.equal(whole[rows.start : rows.stop, columns.start : columns.stop])
    assert stored["m"].num_read == len(rows) * len(columns) and stored["m_scale_inv"].num_read == num_blocks


def test_missing_and_misshapen_factors_are_named(fp8_and_plain):
    folder, _ = fp8_and_plain
    file, name = folder / "model.safetensors", "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"
    weights = load_file(file)
    save_file(weights | {name: torch.ones(4, 2)}, file)
    with pytest.raises(ConfigurationError, match=rf"'{name}' has shape \(4, 2\), the config asks \(4, 1\)"):
        read(folder)
    del weights[name]
    save_file(weights, file)
    with pytest.raises(ConfigurationError, match=f"no tensor '{name}'"):
        read(folder)


def test_corrections_of_the_choice_keep_their_precision(tmp_path):
    made = read(make_checkpoint(tmp_path, "deepseek_v3"), dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert made["layers.1.router"].dtype == torch.bfloat16
    assert made["layers.1.correction"].equal(load_file(tmp_path / "model.safetensors")[name])


def test_spec_holds_what_the_config_says(tmp_path):
    spec = load_model_spec(make_checkpoint(tmp_path, "deepseek_v3"))
    dense, mixture, _ = spec.decoder.layers
    assert isinstance(dense.attention, LatentAttentionSpec) and dense.attention.rope.interleaved
    assert dense.attention.scale == pytest.approx(40**-0.5 * yarn_magnitude(4.0, 1.2) ** 2)
    assert dense.attention.rope.magnitude == pytest.approx(yarn_magnitude(4.0, 0.8) / yarn_magnitude(4.0, 1.2))
    assert (dense.mlp.intermediate_size, mixture.mlp.shared.intermediate_size) == (96, 32)
    layout = spec.kv_layout(4, 16)
    assert (layout.latent, layout.num_kv_heads, layout.head_dim) == (True, 1, 48)
    assert layout.block_bytes_per_rank == 3 * 16 * 48 * 4


def test_chunks_of_more_than_170_tokens_expand_latents_of_v3():
    up = LatentUp(torch.empty(1, 128 + 128, 512), 128)
    assert not up.expanding_pays(170) and up.expanding_pays(171)


def test_absorbed_and_expanded_products_are_the_same():
    up, query, latents = LatentUp(torch.randn(4, 24 + 16, 32), 24), torch.randn(5, 4, 24 + 8), torch.randn(7, 32 + 8)
    keys, values = up.expand(latents)
    absorbed = torch.einsum("thd,cd->htc", up.absorb(query), latents)
    assert torch.allclose(absorbed, torch.einsum("thd,hcd->htc", query, keys), atol=1e-4)
    weights = absorbed.softmax(dim=-1)
    weighed = torch.einsum("htc,cl->thl", weights, latents[:, :32]).flatten(1)
    assert torch.allclose(up.values_of(weighed), torch.einsum("htc,hcv->thv", weights, values).flatten(1), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported are 'greedy'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek_v2", {"n_group": 3}, "n_group 3: 8 experts cannot"),
        ("deepseek_v2", {"topk_group": 5}, "topk_group 5 is not within 1 and n_group 4"),
        ("deepseek_v2", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is not within 1 and 4"),
        ("deepseek_v2", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("deepseek_v3", {"n_group": 8}, "groups of 2 or more"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias True"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, "quantised weights .quant_method 'awq'"),
        (
            "deepseek_v3",
            {"quantization_config": FP8 | {"weight_block_size": [64, 128]}},
            r"quantization_config.weight_block_size \[64, 128\]",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_field(tmp_path, family, changes, message):
    edit_config(make_checkpoint(tmp_path, family), **changes)
    with pytest.raises(ConfigurationError, match=message):
        load_model_spec(tmp_path)

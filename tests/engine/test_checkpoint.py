"""What is read from a checkpoint, and how one that cannot be served is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.errors import ConfigurationError
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_parameters import Share, list_parameters
from engine.parsed_config import parsed_config
from engine.rope import inverse_frequencies
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> None:
    spec = load_model_spec(folder)
    parameters = list_parameters(spec, Share(0, spec.kv_layout(1, 16)))
    for _ in CheckpointReader(folder, spec, CPU).read(parameters):
        pass


def test_spec_holds_what_the_config_says(tmp_path: Path):
    spec = load_model_spec(make_checkpoint(tmp_path, "qwen3", dtype="bfloat16"))
    decoder = spec.decoder
    sizes = (spec.num_layers, spec.hidden_size, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
    assert sizes == (3, 64, 4, 2, 32)
    assert (spec.dtype, spec.max_model_len, spec.vocab_size, spec.eos_token_ids) == ("bfloat16", 1024, 384, {7})
    attention = decoder.layers[0].attention
    assert attention.qk_norm and not attention.qkv_bias and not spec.tie_word_embeddings
    assert spec.kv_layout(1, 16).block_bytes_per_rank == 3 * 16 * 2 * 2 * 32 * 2
    assert load_model_spec(tmp_path, "float32").dtype == "float32"


def test_generation_config_overrides_the_end_tokens(tmp_path: Path):
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load_model_spec(tmp_path).eos_token_ids == {3, 5}


@pytest.mark.parametrize("kind", ["llama3", "linear", "default"])
def test_frequencies_equal_those_of_transformers(tmp_path: Path, kind: str):
    rope = {"rope_type": kind, "rope_theta": 5e5}
    if kind != "default":
        rope |= {"factor": 8.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    make_checkpoint(tmp_path, "llama", head_dim=64, rope_parameters=rope)
    config = AutoConfig.from_pretrained(tmp_path)
    ours = inverse_frequencies(load_model_spec(tmp_path).decoder.layers[0].attention.rope)
    if kind == "default":
        expected = 5e5 ** (-torch.arange(0, 64, 2).double() / 64)
    else:
        expected = ROPE_INIT_FUNCTIONS[kind](config, CPU)[0]
    assert torch.allclose(ours, expected.float(), rtol=1e-5)


def test_revision_tells_weights_apart(tmp_path: Path):
    first = load_model_spec(make_checkpoint(tmp_path / "a", "llama")).revision
    assert load_model_spec(make_checkpoint(tmp_path / "b", "llama")).revision == first
    file = tmp_path / "b" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    assert load_model_spec(tmp_path / "b").revision != first
    edit_config(tmp_path / "a", lambda config: config.update(rms_norm_eps=1e-3))
    assert load_model_spec(tmp_path / "a").revision != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "supported are default, linear",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"dtype": "float64"}, "'float64' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    make_checkpoint(tmp_path, "qwen2")
    edit_config(tmp_path, lambda config: config.update(change))
    with pytest.raises(ConfigurationError, match=message):
        load_model_spec(tmp_path)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="has no config"):
        load_model_spec(tmp_path)
    make_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no safetensors"):
        load_model_spec(tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path):
    make_checkpoint(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: torch.zeros(64, 95)}, file)
    with pytest.raises(ConfigurationError, match=rf"'{name}' has shape \(64, 95\), the config asks \(64, 96\)"):
        load(tmp_path)
    del weights[name]
    save_file(weights, file)
    with pytest.raises(ConfigurationError, match=f"no tensor '{name}'"):
        load(tmp_path)
    file.write_bytes(b"x" * 100)
    with pytest.raises(ConfigurationError, match="cannot read"):
        load(tmp_path)


def test_a_file_that_ends_within_its_tensors_is_refused(tmp_path: Path):
    make_checkpoint(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigurationError, match=r"cannot read .*model\.safetensors"):
        load(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    """A shard that is a link to nowhere, as interrupted downloads leave them; a generation_config.json that is no JSON,
    a config.json that is none.
    """
    make_checkpoint(tmp_path, "qwen2")
    (tmp_path / "model-2.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"cannot read .*model-2\.safetensors: .*No such file"):
        load(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    for text in ("{", "[7]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"cannot read .*generation_config\.json"):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"cannot read .*config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_without_a_quantisation_in_the_config_are_refused(tmp_path: Path, dtype: torch.dtype):
    make_checkpoint(tmp_path, "qwen2")
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(file)
    save_file(weights | {name: weights[name].to(dtype)}, file)
    with pytest.raises(ConfigurationError, match=f"tensor '{name}' holds (I8|F8_E4M3); without a quantization_config"):
        load(tmp_path)


def test_a_parsed_configuration_is_kept_and_parsed_again_when_it_changes(tmp_path: Path):
    checkpoint, cache = make_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "cache"
    first = parsed_config(checkpoint, cache)
    (kept,) = cache.iterdir()
    assert parsed_config(checkpoint, cache) == first
    kept.write_text("{")
    assert parsed_config(checkpoint, cache) == first
    kept.write_text(kept.read_text().replace('"hidden_size": 64', '"hidden_size": 65'))
    assert parsed_config(checkpoint, cache).hidden_size == 65, "the kept one is used"
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert parsed_config(checkpoint, cache).rms_norm_eps == 0.5

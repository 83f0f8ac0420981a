"""Checkpoints of given shapes with random weights, on disk or as a device makes them: speed depends on shapes alone."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.parameters import Parameter, ReadParameters
from engine.weights import TORCH_DTYPES

_SHARD_BYTES = 2 << 30
_SCALE = 0.02  # of matrices


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LlamaForCausalLM with an untied head."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int = 4096


SHAPES = {
    "tiny-long": LlamaShape(64, 16, 1, 1, 128, 512, 33024),  # a long prompt takes seconds on one core
    "160m": LlamaShape(768, 12, 12, 12, 3072, 32000),
    "1b": LlamaShape(2048, 16, 32, 8, 8192, 128256),
    "8b": LlamaShape(4096, 32, 32, 8, 14336, 128256, 8192),
}


def write_random_checkpoint(folder: Path, shape: LlamaShape, seed: int = 0) -> None:
    """Writes config.json and bfloat16 safetensors files: normal(0, 0.02) matrices, norms of one."""
    write_config(folder, shape)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(_SCALE).bfloat16()

    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_heads * shape.num_kv_heads
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    writer = _ShardWriter(folder)
    writer.add({"model.embed_tokens.weight": matrix(shape.vocab_size, hidden)})
    for layer in range(shape.num_layers):
        block = {
            "self_attn.q_proj": matrix(hidden, hidden),
            "self_attn.k_proj": matrix(kv_size, hidden),
            "self_attn.v_proj": matrix(kv_size, hidden),
            "self_attn.o_proj": matrix(hidden, hidden),
            "mlp.gate_proj": matrix(inner, hidden),
            "mlp.up_proj": matrix(inner, hidden),
            "mlp.down_proj": matrix(hidden, inner),
            "input_layernorm": norm.clone(),
            "post_attention_layernorm": norm.clone(),
        }
        writer.add({f"model.layers.{layer}.{name}.weight": tensor for name, tensor in block.items()})
    writer.add({"model.norm.weight": norm.clone(), "lm_head.weight": matrix(shape.vocab_size, hidden)})
    writer.close()


def write_config(folder: Path, shape: LlamaShape) -> None:
    """Writes config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape)))


def write_hollow_checkpoint(folder: Path, shape: LlamaShape) -> None:
    """A checkpoint whose weights are only made by `random_parameters`."""
    write_config(folder, shape)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})


def random_parameters(dtype: str, device: torch.device, seed: int = 0) -> ReadParameters:
    """Makes what `write_random_checkpoint` writes, but for the numbers, on the device."""
    generator = torch.Generator(device).manual_seed(seed)

    def read(parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        for parameter in parameters:
            tensor = torch.ones(parameter.shape, dtype=TORCH_DTYPES[parameter.dtype or dtype], device=device)
            if len(parameter.shape) > 1:
                tensor.normal_(0.0, _SCALE, generator=generator)
            yield tensor

    return read


class _ShardWriter:
    """Collects tensors and writes them in files of bounded size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._num_shards = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._pending.update(tensors)
        if sum(tensor.nbytes for tensor in self._pending.values()) > _SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        index = {"metadata": {}, "weight_map": self._weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _flush(self) -> None:
        if self._pending:
            self._num_shards += 1
            name = f"model-{self._num_shards:05}.safetensors"
            save_file(self._pending, self._folder / name, metadata={"format": "pt"})
            self._weight_map.update(dict.fromkeys(self._pending, name))
            self._pending = {}


def _config(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_model_len,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": None,
    }

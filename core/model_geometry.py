"""The sizes of a decoder-only model, as far as memory and splitting depend on them; read without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError
from core.kv_layout import DTYPE_BYTES, MODEL_DTYPES, KVLayout

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_HEAD_DIM_OF_TYPE = {"qwen3": 128}  # where config.json may leave it out and it is not hidden_size / heads


@dataclass(frozen=True)
class ModelGeometry:
    """Numbers of config.json. `max_model_len` counts prompt and output tokens."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_model_len: int
    dtype: str

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, biases and norms left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * block + self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def weight_bytes_per_rank(self, tensor_parallel: int) -> int:
        """Bytes of one rank's share, what ranks replicate left out."""
        return self.num_parameters * DTYPE_BYTES[self.dtype] // tensor_parallel

    def kv_layout(self, tensor_parallel: int, block_size: int) -> KVLayout:
        """Raises ConfigurationError when the model cannot be split that way."""
        if self.num_heads % tensor_parallel or self.intermediate_size % tensor_parallel:
            raise ConfigurationError(
                f"tensor_parallel {tensor_parallel} must divide {self.num_heads} attention heads and "
                f"an intermediate size of {self.intermediate_size}"
            )
        if max(tensor_parallel, self.num_kv_heads) % min(tensor_parallel, self.num_kv_heads):
            raise ConfigurationError(
                f"tensor_parallel {tensor_parallel} must divide {self.num_kv_heads} KV heads, or be a multiple of them"
            )
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, block_size, self.dtype, tensor_parallel)


def read_geometry(folder: Path, dtype: str | None = None) -> ModelGeometry:
    """Of the checkpoint in `folder`; `dtype` None takes the checkpoint's own. Raises ConfigurationError."""
    file = folder / "config.json"
    try:
        config: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{file} must hold an object")
    missing = [name for name in _REQUIRED if not isinstance(config.get(name), int)]
    if missing:
        raise ConfigurationError(f"{file} names no {', '.join(missing)}")
    heads = config["num_attention_heads"]
    chosen = dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if chosen not in MODEL_DTYPES:
        raise ConfigurationError(f"dtype {chosen!r} is not supported; supported are {', '.join(MODEL_DTYPES)}")
    default_head_dim = _HEAD_DIM_OF_TYPE.get(str(config.get("model_type")), config["hidden_size"] // heads)
    return ModelGeometry(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or default_head_dim,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_model_len=config["max_position_embeddings"],
        dtype=chosen,
    )

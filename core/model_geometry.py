"""The sizes of a decoder-only model, as far as memory and splitting depend on them; read without torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError
from core.kv_groups import KVGroup, group_layers
from core.kv_layout import DTYPE_BYTES, MODEL_DTYPES, KVLayout
from core.layer_windows import layer_windows

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_HEAD_DIM_OF_TYPE = {
    "qwen3": 128,
    "qwen3_moe": 128,
    "gemma2": 256,
    "gemma3_text": 256,
    "gpt_oss": 64,
}  # if config.json has none
_TIED_TYPES = ("gemma2", "gemma3_text")  # unless config.json says otherwise


@dataclass(frozen=True)
class ExpertGeometry:
    """Mixtures of experts: layers from `num_dense_layers` on have one, of experts of one inner size."""

    num_experts: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0


@dataclass(frozen=True)
class LatentGeometry:
    """Multi-head latent attention: what is cached of a token are `kv_lora_rank` numbers, of which every head makes its
    key and value, and a rotated key part that all heads share.
    """

    q_lora_rank: int | None  # of what queries are made of; None: of the hidden state itself
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent_size(self) -> int:
        """Numbers cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def query_size(self) -> int:
        """Of one head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def made_size(self) -> int:
        """Of one head: its key without the rotated part, and its value."""
        return self.qk_nope_head_dim + self.v_head_dim

    def num_parameters(self, hidden_size: int, num_heads: int) -> int:
        """Weights of one layer."""
        queries = self.query_size * num_heads
        made_of = hidden_size if self.q_lora_rank is None else self.q_lora_rank
        down = self.latent_size + (self.q_lora_rank or 0)
        heads = queries * made_of + num_heads * (self.made_size * self.kv_lora_rank + self.v_head_dim * hidden_size)
        return hidden_size * down + heads


@dataclass(frozen=True)
class ModelGeometry:
    """Numbers of config.json. `max_model_len` counts prompt and output tokens.

    Of latents, `num_kv_heads` and `head_dim` are those of their KVLayout.
    """

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
    experts: ExpertGeometry | None = None
    latents: LatentGeometry | None = None
    kv_groups: tuple[KVGroup, ...] = ()  # as in KVLayout

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, biases and norms left out."""
        num_tables = 1 if self.tie_word_embeddings else 2
        return self._layer_parameters(range(self.num_layers)) + num_tables * self._table_parameters

    @property
    def _table_parameters(self) -> int:
        """Of the embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    def _layer_parameters(self, layers: range) -> int:
        if self.latents is None:
            attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        else:
            attention = self.latents.num_parameters(self.hidden_size, self.num_heads)
        return len(layers) * attention + self._mlp_parameters(layers)

    def _mlp_parameters(self, layers: range) -> int:
        dense = 3 * self.hidden_size * self.intermediate_size
        if self.experts is None:
            return len(layers) * dense
        found = self.experts
        inner = found.num_experts * found.intermediate_size + found.shared_intermediate_size
        mixture = self.hidden_size * (3 * inner + found.num_experts)
        num_dense = len(range(layers.start, min(layers.stop, found.num_dense_layers)))
        return num_dense * dense + (len(layers) - num_dense) * mixture

    def num_parameters_of_stage(self, layout: KVLayout, stage: int) -> int:
        """Weights of one stage of a pipeline: the first has the embedding, the last the head, or that embedding too."""
        is_first, is_last = stage == 0, stage == layout.pipeline_parallel - 1
        num_tables = 1 if is_first and is_last and self.tie_word_embeddings else is_first + is_last
        return self._layer_parameters(layout.layers_of_stage(stage)) + num_tables * self._table_parameters

    def weight_bytes_per_rank(self, layout: KVLayout) -> int:
        """Bytes of one rank's share in the largest stage, what ranks replicate left out."""
        largest = max(self.num_parameters_of_stage(layout, stage) for stage in range(layout.pipeline_parallel))
        return largest * DTYPE_BYTES[self.dtype] // layout.tensor_parallel

    def kv_layout(self, tensor_parallel: int, block_size: int, pipeline_parallel: int = 1) -> KVLayout:
        """Raises ConfigurationError, with the field at fault, when the model cannot be split that way."""
        if pipeline_parallel > self.num_layers:
            raise ConfigurationError(
                f"pipeline_parallel {pipeline_parallel} is above the {self.num_layers} layers of the model",
                field="pipeline_parallel",
            )
        if self.num_heads % tensor_parallel:
            raise ConfigurationError(
                f"tensor_parallel {tensor_parallel} must divide {self.num_heads} attention heads",
                field="tensor_parallel",
            )
        for size in self._inner_sizes():
            if size % tensor_parallel:
                raise ConfigurationError(
                    f"tensor_parallel {tensor_parallel} must divide an intermediate size of {size}",
                    field="tensor_parallel",
                )
        if max(tensor_parallel, self.num_kv_heads) % min(tensor_parallel, self.num_kv_heads):
            raise ConfigurationError(
                f"tensor_parallel {tensor_parallel} must divide {self.num_kv_heads} KV heads, or be a multiple of them",
                field="tensor_parallel",
            )
        is_latent = self.latents is not None
        sizes = self.num_layers, self.num_kv_heads, self.head_dim
        return KVLayout(*sizes, block_size, self.dtype, tensor_parallel, is_latent, self.kv_groups, pipeline_parallel)

    def _inner_sizes(self) -> Iterator[int]:
        if self.experts is None or self.experts.num_dense_layers:
            yield self.intermediate_size
        if self.experts is not None:
            yield self.experts.intermediate_size
            yield self.experts.shared_intermediate_size


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
    return geometry_of(config, dtype)


def geometry_of(config: Mapping[str, Any], dtype: str | None = None) -> ModelGeometry:
    """Of what config.json holds, or of a configuration with its defaults filled in. Raises ConfigurationError."""
    heads, kind = config["num_attention_heads"], str(config.get("model_type"))
    unnamed = "bfloat16" if config.get("quantization_config") else "float32"
    chosen = dtype or str(config.get("dtype") or config.get("torch_dtype") or unnamed).removeprefix("torch.")
    if chosen not in MODEL_DTYPES:
        raise ConfigurationError(f"dtype {chosen!r} is not supported; supported are {', '.join(MODEL_DTYPES)}")
    latents = latents_of(config)
    head_dim = config.get("head_dim") or _HEAD_DIM_OF_TYPE.get(kind, config["hidden_size"] // heads)
    return ModelGeometry(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=1 if latents else config.get("num_key_value_heads") or heads,
        head_dim=latents.latent_size if latents else head_dim,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", kind in _TIED_TYPES)),
        max_model_len=config["max_position_embeddings"],
        dtype=chosen,
        experts=_experts_of(config),
        latents=latents,
        kv_groups=group_layers(windows) if any(windows := layer_windows(config)) else (),
    )


def latents_of(config: Mapping[str, Any]) -> LatentGeometry | None:
    """None unless attention is over latents. Raises ConfigurationError naming a size that is none."""
    if config.get("kv_lora_rank") is None:
        return None
    sizes: dict[str, Any] = {field.name: config.get(field.name) for field in fields(LatentGeometry)}
    for name, size in sizes.items():
        if not ((isinstance(size, int) and size > 0) or (size is None and name == "q_lora_rank")):
            raise ConfigurationError(f"{name} is {size!r}; latent attention needs a positive size")
    return LatentGeometry(**sizes)


def _experts_of(config: Mapping[str, Any]) -> ExpertGeometry | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    number = next((int(config[name]) for name in names if config.get(name)), 0)
    if not number:
        return None
    layers, step = range(config["num_hidden_layers"]), int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ()) | {layer for layer in layers if (layer + 1) % step}
    size = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    num_dense = max(len(dense), int(config.get("first_k_dense_replace") or 0))
    return ExpertGeometry(number, size, size * int(config.get("n_shared_experts") or 0), num_dense)

"""Shapes of published models, by name, as their config.json says them. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from core.errors import ConfigurationError
from core.model_geometry import ModelGeometry, geometry_of

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "num_attention_heads": 64}

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": _LLAMA
    | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14336},
    "llama-3.1-70b": _LLAMA
    | {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672},
    "qwen3-32b": _QWEN3
    | {
        "model_type": "qwen3",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_key_value_heads": 8,
        "intermediate_size": 25600,
    },
    "qwen3-235b-a22b": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "minimax-m2": {
        "model_type": "minimax_m2",
        "num_hidden_layers": 62,
        "hidden_size": 3072,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 1536,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 196608,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
    },
}


# Small kernels of a layer beside those that every model has, counted by hand from what the architectures compute, not
# traced: norms of queries and keys (2; of latents 2), choice of experts (2), shared experts' activation and sum (2),
# copies of queries' and keys' parts (2), padding of hidden states and its removal (2), router in float32 (2), norms
# over all ranks' heads (3 more than those of single heads).
_MORE_SMALL_KERNELS = {"qwen3-32b": 2, "qwen3-235b-a22b": 4, "gpt-oss-120b": 4, "deepseek-v3": 8, "minimax-m2": 9}
_NORMED_ACROSS_RANKS = ("minimax-m2",)  # queries and keys, whose squares are summed over ranks


@dataclass(frozen=True)
class ServedModel:
    """A model as its steps' times depend on it."""

    name: str
    geometry: ModelGeometry
    experts_per_token: int = 0
    num_more_small_kernels: int = 0  # of a layer
    is_normed_across_ranks: bool = False


@cache
def served_model(name: str) -> ServedModel:
    """Raises ConfigurationError for a name that is not known."""
    if name not in _CONFIGS:
        raise ConfigurationError(f"model {name!r} is not known; known are {', '.join(_CONFIGS)}", field="model")
    config = _CONFIGS[name]
    return ServedModel(
        name,
        geometry_of(config, "bfloat16"),
        int(config.get("num_experts_per_tok", 0)),
        _MORE_SMALL_KERNELS.get(name, 0),
        name in _NORMED_ACROSS_RANKS,
    )

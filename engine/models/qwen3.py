"""Qwen 3 (dense): a head size of its own, and RMS norms on queries and keys."""

from typing import Any

from engine.models.family import BlockFeatures, Family


def _features(config: Any) -> BlockFeatures:
    bias = config.attention_bias
    return BlockFeatures(head_dim=config.head_dim, qkv_bias=bias, output_bias=bias, qk_norm=True)


def _unsupported(config: Any) -> str:
    return "sliding-window attention" if "sliding_attention" in config.layer_types else ""


FAMILY = Family("Qwen3ForCausalLM", _features, _unsupported)

"""Qwen 2 and 2.5: biases on queries, keys and values."""

from typing import Any

from engine.models.family import BlockFeatures, Family


def _features(config: Any) -> BlockFeatures:
    return BlockFeatures(head_dim=config.hidden_size // config.num_attention_heads, qkv_bias=True)


def _unsupported(config: Any) -> str:
    return "sliding-window attention" if "sliding_attention" in config.layer_types else ""


FAMILY = Family("Qwen2ForCausalLM", _features, _unsupported)

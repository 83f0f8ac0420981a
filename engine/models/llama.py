"""Llama 2 and 3, and everything that ships as LlamaForCausalLM."""

from typing import Any

from engine.models.family import BlockFeatures, Family


def _features(config: Any) -> BlockFeatures:
    return BlockFeatures(
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


FAMILY = Family("LlamaForCausalLM", _features)

"""Llama 2 and 3, and everything that ships as LlamaForCausalLM; Mistral, which adds a sliding window."""

from typing import Any

from core.layer_windows import layer_windows
from engine.model_spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from engine.models.family import Family, head_dim_of, read_activation, rope_of


def read_plain(
    config: Any,
    max_positions: int,
    *,
    qk_norm: bool = False,
    qkv_bias: bool | None = None,
    has_sinks: bool = False,
) -> DecoderSpec:
    """Decoder layers alike but for their windows; biases as the config says, or on queries, keys and values alone."""
    found = vars(config)
    head_dim, rope = head_dim_of(config), rope_of(config, max_positions)
    bias = bool(found.get("attention_bias", False))
    mlp = MlpSpec(config.intermediate_size, read_activation(config.hidden_act), bool(found.get("mlp_bias", False)))
    layers = tuple(
        LayerSpec(
            AttentionSpec(
                rope,
                head_dim**-0.5,
                window,
                qkv_bias=bias if qkv_bias is None else qkv_bias,
                output_bias=bias,
                qk_norm=qk_norm,
                has_sinks=has_sinks,
            ),
            mlp,
        )
        for window in layer_windows(vars(config))
    )
    return DecoderSpec(layers, config.num_attention_heads, config.num_key_value_heads, head_dim, config.rms_norm_eps)


FAMILY = Family("LlamaForCausalLM", read_plain)
MISTRAL = Family("MistralForCausalLM", read_plain)

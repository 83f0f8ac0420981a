"""Gemma 2 and 3 (text): norms around both halves, whose weights count from one; scaled embeddings; local layers among
global ones. Gemma 2 caps scores and logits, Gemma 3 norms queries and keys and turns local layers by another angle.
"""

from typing import Any

from core.layer_windows import layer_windows
from engine.model_spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from engine.models.family import Family, read_activation
from engine.rope_spec import Rope, read_rope
from engine.stored_names import StoredNames


def _read(config: Any, max_positions: int) -> DecoderSpec:
    found = vars(config)
    is_third = config.model_type == "gemma3_text"
    ropes = {kind: _rope(config, kind, max_positions) for kind in dict.fromkeys(config.layer_types)}
    mlp = MlpSpec(config.intermediate_size, read_activation(config.hidden_activation))
    layers = tuple(
        LayerSpec(
            AttentionSpec(
                ropes[kind],
                config.query_pre_attn_scalar**-0.5,
                window,
                softcap=found.get("attn_logit_softcapping"),
                qkv_bias=config.attention_bias,
                output_bias=config.attention_bias,
                qk_norm=is_third,
            ),
            mlp,
            norms_after=True,
        )
        for kind, window in zip(config.layer_types, layer_windows(vars(config)), strict=True)
    )
    return DecoderSpec(
        layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=found.get("final_logit_softcapping"),
    )


def _rope(config: Any, kind: str, max_positions: int) -> Rope:
    parameters = config.rope_parameters
    return read_rope(parameters.get(kind, parameters), config.head_dim, max_positions)


_NAMES = StoredNames(
    attention_norm_after="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_norm_after="post_feedforward_layernorm",
)
GEMMA2 = Family("Gemma2ForCausalLM", _read, _NAMES)
GEMMA3 = Family("Gemma3ForCausalLM", _read, _NAMES)

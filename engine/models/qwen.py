"""Qwen 2 and 2.5: biases on queries, keys and values. Qwen 3: RMS norms on queries and keys; with experts, too."""

from dataclasses import replace
from functools import partial
from typing import Any

from engine.model_spec import DecoderSpec, MlpSpec, MoeSpec, RouterSpec
from engine.models.family import Family, read_activation
from engine.models.llama import read_plain


def _read_experts(config: Any, max_positions: int) -> DecoderSpec:
    plain = read_plain(config, max_positions, qk_norm=True)
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok, renormalise=config.norm_topk_prob)
    mixture = MoeSpec(router, MlpSpec(config.moe_intermediate_size, read_activation(config.hidden_act)))

    def is_dense(layer: int) -> bool:
        return layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step > 0

    layers = tuple(
        layer if is_dense(number) else replace(layer, mlp=mixture) for number, layer in enumerate(plain.layers)
    )
    return replace(plain, layers=layers)


QWEN2 = Family("Qwen2ForCausalLM", partial(read_plain, qkv_bias=True))
QWEN3 = Family("Qwen3ForCausalLM", partial(read_plain, qk_norm=True))
QWEN3_MOE = Family("Qwen3MoeForCausalLM", _read_experts)

"""Mixtral: Mistral with a mixture of experts in every layer."""

from dataclasses import replace
from typing import Any

from engine.model_spec import DecoderSpec, MlpSpec, MoeSpec, RouterSpec
from engine.models.family import Family, read_activation
from engine.models.llama import read_plain
from engine.stored_names import StoredNames


def _read(config: Any, max_positions: int) -> DecoderSpec:
    plain = read_plain(config, max_positions)
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok)
    mixture = MoeSpec(router, MlpSpec(config.intermediate_size, read_activation(config.hidden_act)))
    return replace(plain, layers=tuple(replace(layer, mlp=mixture) for layer in plain.layers))


_EXPERT = "block_sparse_moe.experts.{}."
FAMILY = Family(
    "MixtralForCausalLM",
    _read,
    StoredNames(
        router="block_sparse_moe.gate",
        expert_gate_up=(f"{_EXPERT}w1", f"{_EXPERT}w3"),
        expert_down=f"{_EXPERT}w2",
    ),
)

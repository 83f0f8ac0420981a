"""gpt-oss: Llama with biases, a sink per head, local layers among global ones, and experts behind a clamped gate."""

from dataclasses import replace
from typing import Any

from core.errors import ConfigurationError
from engine.model_spec import SWIGLU_ALPHA, SWIGLU_LIMIT, DecoderSpec, MlpSpec, MoeSpec, RouterSpec
from engine.models.family import Family
from engine.models.llama import read_plain
from engine.stored_names import StoredNames


def _read(config: Any, max_positions: int) -> DecoderSpec:
    gate = (config.swiglu_alpha, config.swiglu_limit)
    if gate != (SWIGLU_ALPHA, SWIGLU_LIMIT):
        raise ConfigurationError(f"swiglu_alpha, swiglu_limit {gate} must be {SWIGLU_ALPHA}, {SWIGLU_LIMIT}")
    plain = read_plain(config, max_positions, has_sinks=True)
    router = RouterSpec(config.num_local_experts, config.num_experts_per_tok, bias=True)
    encoding = "mxfp4" if vars(config).get("quantization_config") else "transposed"
    expert = MlpSpec(config.intermediate_size, "clamped_swiglu", bias=True)
    mixture = MoeSpec(router, expert, fused_encoding=encoding)
    return replace(plain, layers=tuple(replace(layer, mlp=mixture) for layer in plain.layers))


FAMILY = Family(
    "GptOssForCausalLM",
    _read,
    StoredNames(router="mlp.router", fused_gate_up="mlp.experts.gate_up_proj", fused_down="mlp.experts.down_proj"),
    quantised=("mxfp4",),
)

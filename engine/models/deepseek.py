"""DeepSeek-V2 and V3: attention over latents; dense layers first, then mixtures of experts beside shared ones, chosen
within the best groups. Weights may be stored as blocks of FP8, as those of V3 are.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from core.errors import ConfigurationError
from core.model_geometry import latents_of
from engine.model_spec import DecoderSpec, LatentAttentionSpec, LayerSpec, MlpSpec, MoeSpec, RouterSpec
from engine.models.family import Family, read_activation
from engine.rope_spec import read_rope, yarn_magnitude


def _read(read_router: Callable[[Any], RouterSpec], config: Any, max_positions: int) -> DecoderSpec:
    _require(config, "attention_bias", False)
    _require(config, "moe_layer_freq", 1)
    found, attention = vars(config), _read_attention(config, max_positions)
    activation, bias = read_activation(config.hidden_act), bool(found.get("mlp_bias", False))
    shared_size = config.moe_intermediate_size * (config.n_shared_experts or 0)
    mixture = MoeSpec(
        read_router(config),
        MlpSpec(config.moe_intermediate_size, activation),
        MlpSpec(shared_size, activation, bias) if shared_size else None,
    )
    dense, num_dense = MlpSpec(config.intermediate_size, activation, bias), config.first_k_dense_replace or 0
    layers = tuple(
        LayerSpec(attention, dense if number < num_dense else mixture) for number in range(config.num_hidden_layers)
    )
    return DecoderSpec(
        layers,
        config.num_attention_heads,
        1,
        attention.sizes.latent_size,
        config.rms_norm_eps,
        encoding=_read_encoding(config),
    )


def _read_attention(config: Any, max_positions: int) -> LatentAttentionSpec:
    """Of YaRN, `mscale_all_dim` is the temperature of products; angles have what `mscale` differs from it by."""
    sizes, parameters = latents_of(vars(config)), config.rope_parameters
    assert sizes is not None
    rope = read_rope(parameters, sizes.qk_rope_head_dim, max_positions)
    rope = replace(rope, interleaved=bool(vars(config).get("rope_interleave", True)))
    scale = sizes.query_size**-0.5
    if parameters.get("rope_type", "default") != "default" and parameters.get("mscale_all_dim"):
        scale *= yarn_magnitude(float(parameters["factor"]), parameters["mscale_all_dim"]) ** 2
    return LatentAttentionSpec(rope, scale, sizes)


def _read_v2_router(config: Any) -> RouterSpec:
    _require(config, "topk_method", "greedy", "group_limited_greedy")
    _require(config, "scoring_func", "softmax")
    _require(config, "norm_topk_prob", False, None)
    router = RouterSpec(
        config.n_routed_experts,
        config.num_experts_per_tok or 0,
        renormalise=False,
        scale=config.routed_scaling_factor,
    )
    return _in_groups(router, config, 1) if config.topk_method == "group_limited_greedy" else _possible(router)


def _read_v3_router(config: Any) -> RouterSpec:
    _require(config, "topk_method", "noaux_tc")
    _require(config, "scoring_func", "sigmoid")
    router = RouterSpec(
        config.n_routed_experts,
        config.num_experts_per_tok or 0,
        scoring="sigmoid",
        renormalise=bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
        has_correction=True,
    )
    return _in_groups(router, config, 2)


def _in_groups(router: RouterSpec, config: Any, num_scored: int) -> RouterSpec:
    """`num_scored`: experts that a group must have to be scored."""
    num_groups, num_kept = config.n_group or 0, config.topk_group or 0
    if num_groups < 1 or router.num_experts % num_groups or router.num_experts // num_groups < num_scored:
        raise ConfigurationError(
            f"n_group {config.n_group}: {router.num_experts} experts cannot be split into as many groups "
            f"of {num_scored} or more"
        )
    if not 1 <= num_kept <= num_groups:
        raise ConfigurationError(f"topk_group {config.topk_group} is not within 1 and n_group {num_groups}")
    return _possible(replace(router, num_groups=num_groups, num_groups_kept=num_kept))


def _possible(router: RouterSpec) -> RouterSpec:
    limit = router.num_experts // router.num_groups * router.num_groups_kept
    if not 1 <= router.top_k <= limit:
        raise ConfigurationError(
            f"num_experts_per_tok {router.top_k} is not within 1 and {limit}, those to choose from"
        )
    return router


def _read_encoding(config: Any) -> str:
    quantised = vars(config).get("quantization_config")
    if quantised is None:
        return "plain"
    if quantised.get("weight_block_size") != [128, 128]:
        raise ConfigurationError(
            f"quantization_config.weight_block_size {quantised.get('weight_block_size')} is not supported; "
            "supported is [128, 128]"
        )
    return "fp8_blocks"


def _require(config: Any, field: str, *supported: object) -> None:
    """The first is what a configuration without the field means."""
    found = vars(config).get(field, supported[0])
    if found not in supported:
        raise ConfigurationError(f"{field} {found!r} is not supported; supported are {', '.join(map(repr, supported))}")


V2 = Family("DeepseekV2ForCausalLM", partial(_read, _read_v2_router), quantised=("fp8",))
V3 = Family("DeepseekV3ForCausalLM", partial(_read, _read_v3_router), quantised=("fp8",))

"""How a family's checkpoints name their tensors, within `model.layers.N.`; the defaults are Llama's. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredNames:
    """Without `.weight` and `.bias`. Of several names, the tensors are stacked; one name holds them stacked already.

    In names of experts, {} stands for the expert's number. Fused, one tensor holds them all.
    """

    attention_norm: str = "input_layernorm"
    attention_norm_after: str = ""
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_down: str = "self_attn.q_a_proj"
    query_down_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    query: str = "self_attn.q_proj"  # in place of the three above
    latent_down: str = "self_attn.kv_a_proj_with_mqa"
    latent_norm: str = "self_attn.kv_a_layernorm"
    latent_up: str = "self_attn.kv_b_proj"
    output: str = "self_attn.o_proj"
    sinks: str = "self_attn.sinks"
    mlp_norm: str = "post_attention_layernorm"
    mlp_norm_after: str = ""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    expert_down: str = "mlp.experts.{}.down_proj"
    fused_gate_up: str = ""  # [expert, inputs, outputs], gate and up in turn; without a suffix, its bias with `_bias`
    fused_down: str = ""
    shared_gate_up: tuple[str, ...] = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_down: str = "mlp.shared_experts.down_proj"

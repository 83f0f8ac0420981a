"""Small random checkpoints of every supported family, written by transformers itself."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SHARED = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 7,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "mscale": 0.8,
    "mscale_all_dim": 1.2,
    "original_max_position_embeddings": 256,
}
LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
YARN_ROPE_UNTRUNCATED = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "truncate": False,
    "original_max_position_embeddings": 256,
}
WINDOW = 40  # neither a multiple of a block nor a divisor of a chunk
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": False,  # tied, so small a model repeats its input
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_AND_GLOBAL,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (
        Phi3Config,
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        LATENTS | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        LATENTS | {"q_lora_rank": 48, "n_shared_experts": 1, "rope_parameters": YARN_ROPE},
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_AND_GLOBAL,
            "rope_parameters": YARN_ROPE_UNTRUNCATED,
        },
    ),
}


def make_checkpoint(
    folder: Path, name: str, *, shard_size: str = "5GB", dtype: str = "float32", **changes: Any
) -> Path:
    """Writes a model of family `name` with fixed random weights; biases and norms are random too."""
    torch.manual_seed(sum(name.encode()))
    kind, settings = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(kind(**SHARED | settings | changes))
    with torch.no_grad():
        for parameter_name, parameter in chain(model.named_parameters(), model.named_buffers()):
            if parameter_name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.2)
            elif "norm" in parameter_name:
                parameter.normal_(0 if name.startswith("gemma") else 1, 0.2)  # Gemma's count from one
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def make_mxfp4_checkpoint(folder: Path) -> Path:
    """Of gpt-oss as it is published: random blocks and scales in place of the experts' matrices, all else in bfloat16,
    and no dtype in config.json.
    """
    file = make_checkpoint(folder, "gpt_oss", dtype="bfloat16") / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, inputs, outputs = tensors.pop(name).shape
        shape = (num_experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, dtype=torch.uint8)  # weights of about 0.2
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return folder

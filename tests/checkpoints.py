"""Small random checkpoints of every supported family, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

SHARED = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
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


def _config(name: str, changes: dict[str, Any]) -> PreTrainedConfig:
    settings = SHARED | changes
    if name == "llama":
        return LlamaConfig(**{"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE} | settings)
    if name == "qwen2":
        return Qwen2Config(**{"tie_word_embeddings": True} | settings)
    return Qwen3Config(**{"head_dim": 32, "tie_word_embeddings": False} | settings)


def make_checkpoint(
    folder: Path, name: str, *, shard_size: str = "5GB", dtype: str = "float32", **changes: Any
) -> Path:
    """Writes `name` ("llama", "qwen2" or "qwen3") with fixed random weights; biases and norms are random too."""
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(_config(name, changes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in parameter_name:
                parameter.normal_(1, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return folder

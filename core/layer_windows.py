"""How far back each layer of a model looks, read off config.json or off a configuration with its defaults filled in."""

from collections.abc import Mapping
from typing import Any

_ONLY_IF_USED = ("qwen2", "qwen3", "qwen3_moe")  # a window counts where `use_sliding_window` is true
_WINDOW_OF_TYPE = {"gpt_oss": 128} | dict.fromkeys(("gemma2", "gemma3_text", "mistral", *_ONLY_IF_USED), 4096)
_LOCAL = "sliding_attention"


def layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """For each layer, how many positions a token sees, its own included; None: all that there can be."""
    kind = config.get("model_type")
    is_used = config.get("use_sliding_window", kind not in _ONLY_IF_USED) and config.get("kv_lora_rank") is None
    window = config.get("sliding_window", _WINDOW_OF_TYPE.get(str(kind))) if is_used else None  # null: none
    if window is not None and window >= config["max_position_embeddings"]:
        window = None
    return tuple(window if layer_type == _LOCAL else None for layer_type in _layer_types(config))


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """As transformers fills them in where a configuration has none."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    kind, layers = config.get("model_type"), range(config["num_hidden_layers"])
    if kind in ("qwen2", "qwen3"):
        num_global = config.get("max_window_layers", 28)
        return [_LOCAL if layer >= num_global else "full_attention" for layer in layers]
    period = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": config.get("sliding_window_pattern") or 6}.get(str(kind))
    return [_LOCAL if period is None or (layer + 1) % period else "full_attention" for layer in layers]

"""Whether FlashInfer is installed, and what it can compute of a model."""

from types import ModuleType

import torch

from core.kv_layout import KVLayout
from engine.model_spec import AttentionSpec, ModelSpec

_HALVES = ("bfloat16", "float16")
_HEAD_DIMS = (64, 128, 256)
_LATENT_SIZES = (512, 64)


def find_flashinfer() -> ModuleType | None:
    """The module; None where it is not installed. Kernels are compiled when they are first wanted."""
    try:
        import flashinfer
    except ImportError:
        return None
    found: ModuleType = flashinfer
    return found


def why_no_kernels(spec: ModelSpec, device: torch.device) -> str:
    """Empty when it can compute the model's norms, rotations and activations, given that it is installed."""
    if device.type != "cuda":
        return f"it needs CUDA, not {device.type}"
    return "" if spec.dtype in _HALVES else f"it computes {' and '.join(_HALVES)}, not {spec.dtype}"


def why_no_attention(spec: ModelSpec, layout: KVLayout, device: torch.device) -> str:
    """Empty when it can compute the model's attention, given that it is installed."""
    latents = spec.geometry.latents
    if latents is not None:
        sizes = (latents.kv_lora_rank, latents.qk_rope_head_dim)
        if sizes != _LATENT_SIZES:
            return f"it computes latents of {_LATENT_SIZES} elements, not {sizes}"
    elif layout.head_dim not in _HEAD_DIMS:
        return f"it computes heads of {', '.join(map(str, _HEAD_DIMS))} elements, not {layout.head_dim}"
    attentions = [layer.attention for layer in spec.decoder.layers if isinstance(layer.attention, AttentionSpec)]
    if any(attention.has_sinks and attention.softcap is not None for attention in attentions):
        return "it computes sinks or soft caps, not both"
    return why_no_kernels(spec, device)

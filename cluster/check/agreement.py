"""What sections of a configuration must agree on, whatever the hardware (pure)."""

from collections.abc import Iterator

from core.channel_kinds import offered_kinds
from core.config import BatonConfig, PoolConfig
from core.errors import ConfigurationError
from core.model_geometry import ModelGeometry


def dtype_of(pool: PoolConfig, config: BatonConfig, geometry: ModelGeometry) -> str:
    """What the pool computes in: its own, else the model section's, else the checkpoint's."""
    return pool.dtype or config.model.dtype or geometry.dtype


def disagreements(config: BatonConfig, geometry: ModelGeometry) -> Iterator[ConfigurationError]:
    """Each names a field and what it contradicts."""
    prefill, decode = config.prefill, config.decode
    ours, theirs = dtype_of(decode, config, geometry), dtype_of(prefill, config, geometry)
    if ours != theirs:
        yield ConfigurationError(f"{ours}, but prefill has {theirs}: KV cannot pass", field="decode.dtype")
    if prefill.device != decode.device:
        message = f"{decode.device}, but prefill is on {prefill.device}: no channel joins them"
        yield ConfigurationError(message, field="decode.device")
    elif not offered_kinds(config.transfer.channel, prefill.device):
        message = f"{config.transfer.channel} cannot carry pools on {prefill.device}"
        yield ConfigurationError(message, field="transfer.channel")
    asked = config.model.max_model_len
    if asked is not None and asked > geometry.max_model_len:
        message = f"{asked} exceeds the checkpoint's {geometry.max_model_len}"
        yield ConfigurationError(message, field="model.max_model_len")
    for name, pool in (("prefill", prefill), ("decode", decode)):
        num_gpus = pool.resources_per_rank.num_gpus
        if pool.device == "cuda" and num_gpus != 1:
            message = f"{num_gpus:g}: a rank on cuda computes on 1 GPU"
            yield ConfigurationError(message, field=f"{name}.resources_per_rank.num_gpus")

"""The KV geometry of models that fleets can be described with by name: from their published config.json files. Pure."""

from dataclasses import dataclass

from core.errors import ConfigurationError
from core.kv_groups import group_layers
from core.kv_layout import KVLayout


@dataclass(frozen=True)
class KVGeometry:
    """What the cache of a token takes. `latent`: one latent per layer instead of keys and values of heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str = "bfloat16"
    latent: bool = False
    windows: tuple[int | None, ...] = ()  # by layer; empty: none

    def layout(self, tensor_parallel: int, block_size: int) -> KVLayout:
        """Of a replica."""
        groups = group_layers(self.windows) if self.windows else ()
        return KVLayout(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            block_size,
            self.dtype,
            tensor_parallel,
            self.latent,
            groups,
        )


GEOMETRIES = {
    "llama-3.1-8b": KVGeometry(32, 8, 128, 131_072),
    "llama-3.1-70b": KVGeometry(80, 8, 128, 131_072),
    "qwen3-32b": KVGeometry(64, 8, 128, 131_072),
    "deepseek-v3": KVGeometry(61, 1, 576, 163_840, latent=True),
}


def geometry_of(model: str) -> KVGeometry:
    """Raises ConfigurationError for a model that is not known."""
    if (found := GEOMETRIES.get(model.lower())) is None:
        raise ConfigurationError(f"model {model!r} is none of {', '.join(GEOMETRIES)}: describe it under `kv`")
    return found

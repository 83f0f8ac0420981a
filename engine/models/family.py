"""What a family's module says about its models; everything else is the same in all families."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigurationError
from engine.model_spec import Activation, DecoderSpec
from engine.rope_spec import Rope, read_rope
from engine.stored_names import StoredNames

LIKE_LLAMA = StoredNames()

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """A model family: its architecture's name in config.json, how to read its models off a parsed config, and how its
    checkpoints name their tensors. `quantised` lists the quantisation methods whose tensors can be read.

    `read` gets the config and the longest context that is served; it raises ConfigurationError for what of the config
    this engine cannot compute.
    """

    architecture: str
    read: Callable[[Any, int], DecoderSpec]
    names: StoredNames = LIKE_LLAMA
    quantised: tuple[str, ...] = ()  # values of `quant_method` whose weights can be read


def read_activation(name: str) -> Activation:
    """Of `hidden_act`. Raises ConfigurationError."""
    if name not in _ACTIVATIONS:
        raise ConfigurationError(f"activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def head_dim_of(config: Any) -> int:
    """Elements of one attention head."""
    return int(vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any, max_positions: int) -> Rope:
    """The one of all layers."""
    return read_rope(config.rope_parameters, head_dim_of(config), max_positions)

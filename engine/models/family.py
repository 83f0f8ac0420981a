"""What a family module says about its decoder blocks; everything else is the same in all families."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def supports_all(_config: Any) -> str:
    """For families without options that the engine lacks."""
    return ""


@dataclass(frozen=True)
class BlockFeatures:
    """How one family's decoder block departs from the plain one."""

    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of every query and key head before the rotation


@dataclass(frozen=True)
class Family:
    """A model family: its architecture's name in config.json, and how to read the features off a parsed config.

    `unsupported` returns what of the config this engine cannot compute, or an empty text.
    """

    architecture: str
    features: Callable[[Any], BlockFeatures]
    unsupported: Callable[[Any], str] = supports_all

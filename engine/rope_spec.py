"""How positions become angles, in numbers. Pure."""

from dataclasses import dataclass
from math import log, sqrt
from typing import Any

from core.errors import ConfigurationError


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """NTK by parts (Peng et al., "YaRN", 2023): pairs that turn less than `beta_slow` times within the original length
    are stretched, more than `beta_fast` times kept, those between blended.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_positions: int
    truncate: bool  # the blend begins and ends at whole pairs


@dataclass(frozen=True)
class LongScaling:
    """A factor per pair (Ding et al., "LongRoPE", 2024)."""

    factors: tuple[float, ...]


Scaling = Llama3Scaling | YarnScaling | LongScaling | float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; `scaling` is None, a linear factor, or one of the rules above."""

    theta: float
    rotated: int  # the first elements of a head that are rotated
    scaling: Scaling | None = None
    magnitude: float = 1.0  # of cosines and sines
    interleaved: bool = False  # neighbours make a pair, not elements of two halves


def read_rope(parameters: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    """Of `rope_parameters` as transformers parses them. Raises ConfigurationError for an unknown kind.

    `max_positions`: the longest context that the model is served with; long factors are taken when it is beyond the
    original length, since keys that are cached cannot change theirs.
    """
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    original = int(parameters.get("original_max_position_embeddings") or max_positions)
    match kind:
        case "default":
            return Rope(theta, rotated)
        case "linear":
            return Rope(theta, rotated, float(parameters["factor"]))
        case "llama3":
            low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
            return Rope(theta, rotated, Llama3Scaling(float(parameters["factor"]), low, high, original))
        case "yarn":
            return _read_yarn(parameters, theta, rotated, original)
        case "longrope":
            return _read_long(parameters, theta, rotated, original, max_positions)
    raise ConfigurationError(
        f"rope type {kind!r} is not supported; supported are default, linear, llama3, yarn, longrope"
    )


def _read_yarn(parameters: dict[str, Any], theta: float, rotated: int, original: int) -> Rope:
    factor = float(parameters["factor"])
    magnitude, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    found = parameters.get("attention_factor")
    if found is None:
        found = yarn_magnitude(factor, magnitude) / yarn_magnitude(factor, all_dims) if magnitude and all_dims else None
    scaling = YarnScaling(
        factor,
        float(parameters.get("beta_fast") or 32),
        float(parameters.get("beta_slow") or 1),
        original,
        bool(parameters.get("truncate", True)),
    )
    return Rope(theta, rotated, scaling, yarn_magnitude(factor, 1.0) if found is None else float(found))


def yarn_magnitude(factor: float, scale: float) -> float:
    """The paper's attention temperature, as a factor of queries and keys each."""
    return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0


def _read_long(parameters: dict[str, Any], theta: float, rotated: int, original: int, max_positions: int) -> Rope:
    factors = parameters["long_factor" if max_positions > original else "short_factor"]
    found = parameters.get("attention_factor")
    if found is None:
        factor = float(parameters.get("factor") or max_positions / original)
        found = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    return Rope(theta, rotated, LongScaling(tuple(map(float, factors))), float(found))

"""Reads a Hugging Face checkpoint's configuration into the few numbers that the engine computes with."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError
from core.kv_layout import MODEL_DTYPES, KVLayout
from core.model_geometry import ModelGeometry
from engine.models.family import BlockFeatures
from engine.models.registry import FAMILIES
from engine.parsed_config import parsed_config
from engine.rope import Llama3Scaling, Rope

_SAMPLED_PAGES = 64  # per weight file, for the revision
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model. `max_model_len` counts prompt and output tokens."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    features: BlockFeatures
    rope: Rope
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_model_len: int
    dtype: str
    eos_token_ids: frozenset[int]
    revision: str  # equal for equal configuration and weights; see `checkpoint_revision`

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.features.head_dim

    @property
    def geometry(self) -> ModelGeometry:
        """What memory and splitting depend on."""
        return ModelGeometry(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tie_word_embeddings,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
        )

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, biases and norms left out."""
        return self.geometry.num_parameters

    def kv_layout(self, tensor_parallel: int, block_size: int) -> KVLayout:
        """Raises ConfigurationError when the model cannot be split that way."""
        return self.geometry.kv_layout(tensor_parallel, block_size)


def load_model_spec(path: Path, dtype: str | None = None) -> ModelSpec:
    """Reads config.json, generation_config.json and the headers of the weight files.

    `dtype` None takes the checkpoint's own. Raises ConfigurationError for what cannot be read or is not supported.
    """
    config = parsed_config(path)
    architecture = _supported_architecture(config)
    return ModelSpec(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        features=FAMILIES[architecture].features(config),
        rope=_rope(config.rope_parameters),
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        max_model_len=config.max_position_embeddings,
        dtype=_dtype(dtype or str(config.dtype or "float32").removeprefix("torch.")),
        eos_token_ids=_eos_token_ids(path, config.eos_token_id),
        revision=checkpoint_revision(path),
    )


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order. Raises ConfigurationError when there are none."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(f"{path} holds no safetensors files")
    return files


def checkpoint_revision(path: Path) -> str:
    """Cheap digest of config.json and, of each weight file, name, size, header and evenly spaced pages.

    Raises ConfigurationError for a file that is cut short.
    """
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=16)
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > size - 8:
                raise ConfigurationError(f"cannot read {file}: it is cut short or no safetensors file")
            digest.update(stream.read(header_bytes))
            for page in range(_SAMPLED_PAGES):
                stream.seek(8 + header_bytes + (size - 8 - header_bytes) * page // _SAMPLED_PAGES)
                digest.update(stream.read(_PAGE_BYTES))
    return digest.hexdigest()


def _supported_architecture(config: Any) -> str:
    names: list[str] = config.architectures or []
    found = next((name for name in names if name in FAMILIES), None)
    if found is None:
        raise ConfigurationError(f"architectures {names} are not supported; supported are {', '.join(FAMILIES)}")
    problem = FAMILIES[found].unsupported(config)
    if "quantization_config" in vars(config):
        problem = "quantised weights"
    if config.hidden_act != "silu":
        problem = f"activation {config.hidden_act!r}"
    if problem:
        raise ConfigurationError(
            f"{found} with {problem} is not supported; supported are full attention, silu and unquantised weights"
        )
    return found


def _rope(parameters: dict[str, Any]) -> Rope:
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigurationError("a partial rotary factor is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, float(parameters["factor"]))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
        return Rope(theta, scaling)
    raise ConfigurationError(f"rope type {kind!r} is not supported; supported are default, linear, llama3")


def _dtype(name: str) -> str:
    if name not in MODEL_DTYPES:
        raise ConfigurationError(f"dtype {name!r} is not supported; supported are {', '.join(MODEL_DTYPES)}")
    return name


def _eos_token_ids(path: Path, from_config: int | list[int] | None) -> frozenset[int]:
    found = from_config
    generation_config = path / "generation_config.json"
    if generation_config.is_file():
        found = json.loads(generation_config.read_text()).get("eos_token_id", found)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)

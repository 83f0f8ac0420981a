"""Reads a Hugging Face checkpoint's configuration into the few numbers that the engine computes with."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError
from core.model_geometry import geometry_of
from engine.model_spec import ModelSpec
from engine.models.registry import FAMILIES
from engine.parsed_config import parsed_config

_SAMPLED_PAGES = 64  # per weight file, for the revision
_PAGE_BYTES = 4096


def load_model_spec(path: Path, dtype: str | None = None, max_model_len: int | None = None) -> ModelSpec:
    """Reads config.json, generation_config.json and the headers of the weight files.

    `dtype` None takes the checkpoint's own, `max_model_len` None its limit. Raises ConfigurationError for what cannot
    be read or is not supported.
    """
    config = parsed_config(path)
    architecture = _supported_architecture(config)
    _require_readable(config, architecture)
    geometry = geometry_of(vars(config), dtype)
    limit = min(max_model_len or geometry.max_model_len, geometry.max_model_len)
    return ModelSpec(
        architecture=architecture,
        decoder=FAMILIES[architecture].read(config, limit),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
        max_model_len=geometry.max_model_len,
        dtype=geometry.dtype,
        eos_token_ids=_eos_token_ids(path, config.eos_token_id),
        revision=checkpoint_revision(path),
        geometry=geometry,
    )


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order. Raises ConfigurationError when there are none."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(f"{path} holds no safetensors files")
    return files


def checkpoint_revision(path: Path) -> str:
    """Cheap digest of config.json and, of each weight file, name, size, header and evenly spaced pages.

    Raises ConfigurationError for a file that is cut short or cannot be read.
    """
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=16)
    for file in weight_files(path):
        try:
            for piece in _samples(file):
                digest.update(piece)
        except OSError as error:
            raise ConfigurationError(f"cannot read {file}: {error}") from error
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{file.name}:{size}".encode()
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > size - 8:
            raise ConfigurationError(f"cannot read {file}: it is cut short or no safetensors file")
        yield stream.read(header_bytes)
        for page in range(_SAMPLED_PAGES):
            stream.seek(8 + header_bytes + (size - 8 - header_bytes) * page // _SAMPLED_PAGES)
            yield stream.read(_PAGE_BYTES)


def _supported_architecture(config: Any) -> str:
    names: list[str] = config.architectures or []
    found = next((name for name in names if name in FAMILIES), None)
    if found is None:
        raise ConfigurationError(f"architectures {names} are not supported; supported are {', '.join(FAMILIES)}")
    return found


def _require_readable(config: Any, architecture: str) -> None:
    found, readable = vars(config).get("quantization_config"), FAMILIES[architecture].quantised
    if found is not None and found.get("quant_method") not in readable:
        method, known = found.get("quant_method"), f"; supported is {', '.join(readable)}" if readable else ""
        raise ConfigurationError(
            f"{architecture} with quantised weights (quant_method {method!r}) is not supported{known}"
        )


def _eos_token_ids(path: Path, from_config: int | list[int] | None) -> frozenset[int]:
    found = from_config
    generation_config = path / "generation_config.json"
    if generation_config.is_file():
        try:
            found = json.loads(generation_config.read_text()).get("eos_token_id", found)
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"cannot read {generation_config}: {error}") from error
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)

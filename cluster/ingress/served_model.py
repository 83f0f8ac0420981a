"""What the HTTP edge knows of the model it serves: names, limits, and the defaults that the checkpoint asks for."""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.ingress.tokenizer import Tokenizer, load_tokenizer
from core.errors import ConfigurationError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that says nothing gets. `max_tokens` None: the rest of the context (chat only)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None


@dataclass(frozen=True)
class ServedModel:
    """One served model. `vocab_size` bounds token ids of prompts; `max_model_len` prompt and output together."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    defaults: SamplingDefaults = SamplingDefaults()
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970, as OpenAI's


def load_served_model(folder: Path, name: str = "", max_model_len: int | None = None) -> ServedModel:
    """Reads tokenizer, config.json and generation_config.json of a checkpoint. Raises ConfigurationError.

    `name` defaults to the folder's, `max_model_len` to the checkpoint's own limit, which it must not exceed.
    """
    tokenizer = load_tokenizer(folder)
    config = _read_json(folder / "config.json")
    config = config.get("text_config") or config
    generation = _read_json(folder / "generation_config.json", optional=True)
    limit: int | None = config.get("max_position_embeddings")
    if (own := max_model_len or limit) is None:
        raise ConfigurationError(f"{folder}/config.json names no max_position_embeddings: set model.max_model_len")
    if max_model_len is not None and limit is not None and max_model_len > limit:
        raise ConfigurationError(f"model.max_model_len {max_model_len} exceeds the checkpoint's {limit}")
    return ServedModel(
        name=name or folder.name,
        tokenizer=tokenizer,
        max_model_len=own,
        vocab_size=int(config.get("vocab_size") or tokenizer.vocab_size),
        eos_token_ids=_eos_token_ids(tokenizer, generation.get("eos_token_id", config.get("eos_token_id"))),
        defaults=_sampling_defaults(generation),
    )


def _eos_token_ids(tokenizer: Tokenizer, configured: int | list[int] | None) -> frozenset[int]:
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """The checkpoint authors' sampling; what cannot be honoured is logged."""
    neutral = SamplingDefaults()
    for key, off in (("repetition_penalty", 1.0), ("min_p", 0.0)):
        if generation.get(key) not in (None, off):
            _log.warning("generation_config.json asks for %s=%s, which is not supported", key, generation[key])
    chosen = {key: value for key, value in generation.items() if value is not None}
    return SamplingDefaults(
        temperature=float(chosen.get("temperature", neutral.temperature)),
        top_p=float(chosen.get("top_p", neutral.top_p)),
        top_k=int(chosen.get("top_k", neutral.top_k)),
        max_tokens=chosen.get("max_new_tokens"),
    )


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path} must hold an object")
    return tree

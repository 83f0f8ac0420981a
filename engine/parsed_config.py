"""A checkpoint's configuration as `transformers` parses it, kept for the next start.

Importing transformers' configuration classes takes seconds of CPU, on every rank of every replica; the outcome is a
small dictionary that depends on config.json and the library's version alone.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core.errors import ConfigurationError

CACHE = Path.home() / ".cache" / "baton" / "parsed-configs"


def parsed_config(path: Path, cache: Path = CACHE) -> SimpleNamespace:
    """Attributes of the checkpoint's PreTrainedConfig. Raises ConfigurationError for what cannot be read."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigurationError(f"{path} is no checkpoint: it has no config.json")
    key = hashlib.blake2b(file.read_bytes() + version("transformers").encode(), digest_size=16).hexdigest()
    known = _read(cache / f"{key}.json")
    if known is None:
        known = _parse(path)
        _write(cache / f"{key}.json", known)
    return SimpleNamespace(**known)


def _parse(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"cannot read {path / 'config.json'}: {error}") from error
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return tree


def _read(file: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError):
        return None  # absent, or cut short by a crash: parsed again
    return tree if isinstance(tree, dict) else None


def _write(file: Path, tree: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{id(tree)}.tmp")
        draft.write_text(json.dumps(tree))
        draft.replace(file)
    except OSError:
        return  # a read-only home: every start parses

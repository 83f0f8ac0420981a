"""Counts a checkpoint's parameters by the headers of its weight files."""

import json
from math import prod
from pathlib import Path
from typing import Any

from core.errors import ConfigurationError


def count_parameters(folder: Path) -> int | None:
    """Of all safetensors files in `folder`; None where there are none yet. Raises ConfigurationError."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(map(_count, files)) if files else None


def _count(file: Path) -> int:
    """The format: 8 bytes of little-endian header length, then JSON with a shape per tensor."""
    try:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > file.stat().st_size:
                raise ValueError("it is cut short")
            header = json.loads(stream.read(header_bytes))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        if 8 + header_bytes + max((tensor["data_offsets"][1] for tensor in tensors), default=0) > file.stat().st_size:
            raise ValueError("it is cut short")
        return sum(_weights(name, tensor) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"cannot read {file}: it is cut short or no safetensors file") from error


def _weights(name: str, tensor: dict[str, Any]) -> int:
    """MXFP4 packs two weights into each byte of its blocks, which are decoded on load; scales are not kept."""
    if tensor["dtype"] == "U8" and name.endswith(("_blocks", "_scales")):
        return 2 * prod(tensor["shape"]) if name.endswith("_blocks") else 0
    return prod(tensor["shape"])

"""Reads parameters from a safetensors checkpoint, only the slices that the rank needs."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ConfigurationError
from engine.checkpoint import weight_files
from engine.model_spec import ModelSpec
from engine.parameters import Parameter, Part
from engine.stored_encodings import DECODERS
from engine.weights import TORCH_DTYPES

_NUM_READERS = 4
_PIECE_ELEMENTS = 1 << 23  # read at a time by one of them


class CheckpointReader:
    """Tensors by name over all files, cast and moved as they are read. Files are opened at the first read."""

    def __init__(self, path: Path, spec: ModelSpec, device: torch.device) -> None:
        self._path = path
        self._dtype = spec.dtype
        self._device = device
        self._files: dict[str, Any] = {}

    def read(self, parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        """Several at a time, since disks answer many readers faster than one.

        Raises ConfigurationError naming a missing or misshapen tensor, or a file that is none of safetensors.
        """
        if not self._files:
            self._open()
        reading: deque[tuple[Tensor, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="checkpoint") as readers:
            try:
                for parameter in parameters:
                    if len(reading) == _NUM_READERS:
                        yield _whole(*reading.popleft())
                    tensor = self._empty(parameter)
                    pieces = [readers.submit(self._fill, rows, part) for rows, part in _pieces(tensor, parameter)]
                    reading.append((tensor, pieces))
                while reading:
                    yield _whole(*reading.popleft())
            finally:
                for _, pieces in reading:
                    for piece in pieces:
                        piece.cancel()

    def _empty(self, parameter: Parameter) -> Tensor:
        dtype = TORCH_DTYPES[parameter.dtype or self._dtype]
        return torch.empty(parameter.shape, dtype=dtype, device=self._device)

    @torch.inference_mode()
    def _fill(self, rows: Tensor, part: Part) -> None:
        rows.copy_(DECODERS[part.encoding](part, self._slice))  # maps the file: its pages are read as they are copied

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ConfigurationError(f"the checkpoint has no tensor {name!r}")
        return self._files[name].get_slice(name)

    def _open(self) -> None:
        for file in weight_files(self._path):
            try:
                opened = safe_open(str(file), framework="pt")
            except SafetensorError as error:
                raise ConfigurationError(f"cannot read {file}: {error}") from error
            self._files.update((name, opened) for name in opened.keys())  # type: ignore[no-untyped-call]  # noqa: SIM118


def _pieces(tensor: Tensor, parameter: Parameter) -> Iterator[tuple[Tensor, Part]]:
    """Rows of the tensor and the part of a part that belongs there; what no part fills becomes zero."""
    row = 0
    for part in parameter.parts:
        rows = part.rows or range(part.shape[0])
        at_a_time = max(1, _PIECE_ELEMENTS // prod(part.taken[1:]))
        for first in range(0, len(rows), at_a_time):
            taken = rows[first : first + at_a_time]
            yield tensor[row : row + len(taken)], replace(part, rows=taken)
            row += len(taken)
    tensor[row:] = 0


def _whole(tensor: Tensor, pieces: Sequence["Future[None]"]) -> Tensor:
    for piece in pieces:
        piece.result()
    return tensor

"""Reads parameters from a safetensors checkpoint, only the slices that the rank needs."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ConfigurationError
from engine.checkpoint import weight_files
from engine.model_spec import ModelSpec
from engine.parameters import Parameter
from engine.stored_encodings import DECODERS
from engine.weights import TORCH_DTYPES

_NUM_READERS = 4


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
        reading: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="checkpoint") as readers:
            try:
                for parameter in parameters:
                    if len(reading) == _NUM_READERS:
                        yield reading.popleft().result()
                    reading.append(readers.submit(self._parameter, parameter))
                while reading:
                    yield reading.popleft().result()
            finally:
                for future in reading:
                    future.cancel()

    def _parameter(self, parameter: Parameter) -> Tensor:
        dtype = TORCH_DTYPES[parameter.dtype or self._dtype]
        tensor = torch.empty(parameter.shape, dtype=dtype, device=self._device)
        row = 0
        for part in parameter.parts:
            stored = DECODERS[part.encoding](part, self._slice)  # maps the file: its pages are read as they are copied
            tensor[row : row + len(stored)] = stored
            row += len(stored)
        tensor[row:] = 0
        return tensor

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

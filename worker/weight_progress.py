"""Tells in the log how far the loading of weights is."""

import logging
import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from engine.parameters import Parameter, ReadParameters

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 2.0


class ReadingProgress:
    """Reads like `read`, and tells every two seconds, and in the end."""

    def __init__(self, read: ReadParameters, dtype: str) -> None:
        self._read = read
        self._dtype = dtype

    def read(self, parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        """See ReadParameters."""
        started = told = time.monotonic()
        total, done = sum(parameter.num_bytes(self._dtype) for parameter in parameters), 0
        for parameter, tensor in zip(parameters, self._read(parameters), strict=True):
            yield tensor
            done += parameter.num_bytes(self._dtype)
            now = time.monotonic()
            if now - told > _TELL_EVERY_S or done == total:
                told, rate = now, done / max(now - started, 1e-9)
                logger.info(
                    "weights: %d %% of %.2f GB in %.1f s, %.2f GB/s",
                    100 * done // total,
                    total / 1e9,
                    now - started,
                    rate / 1e9,
                )

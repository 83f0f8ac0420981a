"""Tells in the log how far the loading of weights is."""

import logging
import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from engine.parameters import Parameter, ReadParameters

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 2.0


def reporting(read: ReadParameters, dtype: str) -> ReadParameters:
    """Reads like `read`, and tells every two seconds, and in the end."""

    def read_and_tell(parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        started = told = time.monotonic()
        total, done = sum(parameter.num_bytes(dtype) for parameter in parameters), 0
        for parameter, tensor in zip(parameters, read(parameters), strict=True):
            yield tensor
            done += parameter.num_bytes(dtype)
            now = time.monotonic()
            if now - told > _TELL_EVERY_S or done == total:
                told, passed_s = now, max(now - started, 1e-9)
                share, rate = 100 * done // total, done / passed_s / 1e9
                logger.info("weights: %d %% of %.2f GB in %.1f s, %.2f GB/s", share, total / 1e9, passed_s, rate)

    return read_and_tell

"""A rank's weights as one run of bytes, its parameters one after another as they are loaded.

parameters   |  embedding  | qkv |  output  | ...
windows      |      0      |      1      |  ...        what two ranks exchange at a time
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.parameters import Parameter
from engine.weights import StoredAs


@dataclass(frozen=True)
class Piece:
    """Bytes `start:stop` of one parameter."""

    parameter: int
    start: int
    stop: int


class WeightImage:
    """Where each parameter lies. Equal parameters of equal dtype make equal images."""

    def __init__(self, parameters: Sequence[Parameter], dtype: str) -> None:
        self._numbers = {parameter.name: number for number, parameter in enumerate(parameters)}
        self._starts = list(accumulate((parameter.num_bytes(dtype) for parameter in parameters), initial=0))

    @property
    def num_bytes(self) -> int:
        """Of the whole."""
        return self._starts[-1]

    def place(self, parameters: Sequence[Parameter]) -> tuple[int, int]:
        """First byte, and the one behind the last, of neighbouring parameters."""
        first, last = self._numbers[parameters[0].name], self._numbers[parameters[-1].name]
        return self._starts[first], self._starts[last + 1]

    def pieces(self, first_byte: int, num_bytes: int) -> Iterator[Piece]:
        """What the run holds, in its order."""
        end = min(first_byte + num_bytes, self.num_bytes)
        while first_byte < end:
            number = bisect_right(self._starts, first_byte) - 1
            stop = min(end, self._starts[number + 1])
            yield Piece(number, first_byte - self._starts[number], stop - self._starts[number])
            first_byte = stop


class StoredImage:
    """The image of weights in place. Parameters that have to be made are made one at a time; not for two threads."""

    def __init__(self, image: WeightImage, stored: Sequence[StoredAs]) -> None:
        self.image = image
        self._stored = stored
        self._made = -1, torch.empty(0)

    def read(self, first_byte: int, num_bytes: int, window: Tensor) -> None:
        """Copies a run of the image to the front of `window`, uint8, on its device; returns when it is there."""
        offset = 0
        for piece in self.image.pieces(first_byte, num_bytes):
            length = piece.stop - piece.start
            window[offset : offset + length] = bytes_of(self._parameter(piece.parameter))[piece.start : piece.stop]
            offset += length
        if window.is_cuda:
            torch.cuda.current_stream(window.device).synchronize()

    def _parameter(self, number: int) -> Tensor:
        if self._made[0] != number:
            self._made = number, self._stored[number]()
        return self._made[1]


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, a view."""
    return tensor.view(-1).view(torch.uint8)

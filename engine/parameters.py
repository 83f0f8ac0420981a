"""The tensors of one rank, each cut out of stored tensors."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from core.kv_layout import DTYPE_BYTES

WHOLE = range(0)  # the full extent of a dimension


@dataclass(frozen=True)
class Part:
    """A rectangle of a stored matrix or vector, whose full shape, once decoded, must be `shape`; `rows` may step."""

    name: str
    shape: tuple[int, ...]
    rows: range = WHOLE
    columns: range = WHOLE
    encoding: str = "plain"  # see stored_encodings
    expert: int = 0
    num_experts: int = 0  # whose matrices the tensor holds, along a dimension that comes first; 0: it holds this alone

    @property
    def taken(self) -> tuple[int, ...]:
        """The rectangle's shape."""
        ranges = (self.rows, self.columns)[: len(self.shape)]
        return tuple(len(taken) or full for taken, full in zip(ranges, self.shape, strict=True))


@dataclass(frozen=True)
class Parameter:
    """A tensor of one rank: parts of stored tensors, stacked along their rows, then zeros up to `shape`."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: str | None = None  # None: the model's

    def num_bytes(self, dtype: str) -> int:
        """Of memory, in a model of that dtype."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype or dtype]


ReadParameters = Callable[[Sequence[Parameter]], Iterator[Tensor]]  # in their order, on the rank's device


def stacked(name: str, *parts: Part) -> Parameter:
    """Parts one above the other."""
    taken = [part.taken for part in parts]
    return Parameter(name, (sum(rows for rows, *_ in taken), *taken[0][1:]), parts)


def fingerprint(parameters: Sequence[Parameter]) -> str:
    """Equal where the same parameters are laid out alike."""
    return hashlib.blake2b(repr(parameters).encode(), digest_size=16).hexdigest()

"""What a rank tells its peers of its KV pool so that they can read it by themselves: its form, and where it lies.

As a rendezvous it is one flat JSON object, in which bytes are base64.
"""

import base64
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from core.errors import TransferFailed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PlaceT = TypeVar("PlaceT", bound="DataclassInstance")  # frozen; its fields are numbers, strings and bytes


@dataclass(frozen=True)
class PoolHandle(Generic[PlaceT]):
    """A pool as others see it; `place` says in the words of one transport where it lies."""

    shape: tuple[int, ...]
    dtype: str
    place: PlaceT

    @classmethod
    def of(cls, pool: Tensor, place: PlaceT) -> "PoolHandle[PlaceT]":
        """Of an own pool."""
        return cls(tuple(pool.shape), str(pool.dtype), place)

    def encode(self) -> str:
        """As a rendezvous."""
        place = {name: _as_text(value) for name, value in asdict(self.place).items()}
        return json.dumps({"shape": self.shape, "dtype": self.dtype, **place})

    @classmethod
    def decode(cls, rendezvous: str, kind: type[PlaceT]) -> "PoolHandle[PlaceT]":
        """Raises TransferFailed for what `encode`, with a place of this kind, did not write."""
        try:
            told = json.loads(rendezvous)
            shape, dtype = tuple(told.pop("shape")), told.pop("dtype")
            for field in fields(kind):
                if field.type is bytes:
                    told[field.name] = base64.b64decode(told[field.name], validate=True)
            return cls(shape, dtype, kind(**told))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TransferFailed(f"not the handle of a pool: {rendezvous[:80]!r}") from error

    def require_fits(self, pool: Tensor) -> Tensor:
        """The peer's pool as a tensor without memory. Raises TransferFailed unless KV can pass to `pool` as it is.

        The number of blocks and of heads may differ.
        """
        sizes, dtype = self.shape, self.dtype
        ours = (str(pool.dtype), pool.shape[0], pool.shape[2], *pool.shape[4:])
        if len(sizes) != 6 or (dtype, sizes[0], sizes[2], *sizes[4:]) != ours:
            raise TransferFailed(f"a pool {sizes} of {dtype} does not fit one {tuple(pool.shape)} of {pool.dtype}")
        return torch.empty(sizes, dtype=pool.dtype, device="meta")


def _as_text(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value

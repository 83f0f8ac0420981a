"""How a span of KV looks inside a slab."""

from typing import Protocol

from torch import Tensor

from core.errors import ConfigurationError
from core.messages.to_rank import Span
from kv_transfer.spans import gather, scatter, span_bytes


class WireFormat(Protocol):
    """Both ends of a channel use the same one. Slabs are uint8 [num_bytes] on the pool's device."""

    def num_bytes(self, pool: Tensor, span: Span) -> int:
        """Size of the slab that carries a span."""
        ...

    def pack(self, pool: Tensor, span: Span, slab: Tensor) -> None:
        """Fills the slab with a span of the pool."""
        ...

    def unpack(self, slab: Tensor, pool: Tensor, span: Span) -> None:
        """Writes the slab into a span of the pool."""
        ...


class AsStored:
    """Byte for byte."""

    def num_bytes(self, pool: Tensor, span: Span) -> int:
        """See WireFormat."""
        return span_bytes(pool, span)

    def pack(self, pool: Tensor, span: Span, slab: Tensor) -> None:
        """See WireFormat."""
        gather(pool, span, slab)

    def unpack(self, slab: Tensor, pool: Tensor, span: Span) -> None:
        """See WireFormat."""
        scatter(slab, pool, span)


def make_wire_format(wire_dtype: str) -> WireFormat:
    """Empty: as stored. Raises ConfigurationError for a name that is not known."""
    if wire_dtype:
        raise ConfigurationError(f"KV cannot travel as {wire_dtype}", field="transfer.wire_dtype")
    return AsStored()

"""How a span of KV looks inside a slab."""

from typing import Protocol

import torch
from torch import Tensor

from core.errors import ConfigurationError, TransferFailed
from core.messages.to_rank import Span
from kv_transfer.spans import gather, run_elements, scatter, span_bytes

_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_SCALE = 2.0**-126  # the smallest of full precision
_SCALE_BYTES = 4
_NUMBERS_AT_ONCE = 2**18  # converted together: what is in between stays in a CPU's cache, and small


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


class Float8:
    """Numbers of 16 or 32 bits as float8_e4m3fn, one float32 scale to each row: the tokens of one head of one piece.

    The slab: all rows' scales, then all rows' numbers. A row's largest magnitude becomes 448, the format's largest. A
    number x of a row with the largest magnitude m comes back within max(|x| / 16, m / 458752) of x, up to rounding to
    the pool's dtype: half a unit of 3 mantissa bits, or of the format's smallest, 2^-9 of m / 448; m counts as 2^-117
    at least. KV must be finite; a row that is not comes back as NaN. The format: Micikevicius et al., "FP8 formats for
    deep learning", 2022.
    """

    def num_bytes(self, pool: Tensor, span: Span) -> int:
        """See WireFormat. Raises TransferFailed for a pool whose numbers are no wider than the format's."""
        if pool.dtype.itemsize == 1 or not pool.is_floating_point():
            raise TransferFailed(f"KV stored as {pool.dtype} cannot travel as float8_e4m3fn")
        num_numbers = span_bytes(pool, span) // pool.element_size()
        return num_numbers + num_numbers // run_elements(pool, span) * _SCALE_BYTES

    def pack(self, pool: Tensor, span: Span, slab: Tensor) -> None:
        """See WireFormat."""
        stored = self._stored(pool, span)
        at_once = max(1, _NUMBERS_AT_ONCE // stored.shape[1])
        parts = (torch.split(part, at_once) for part in (stored, *self._parts(slab, len(stored))))
        for rows, scales, numbers in zip(*parts, strict=True):
            largest = rows.abs().amax(1, keepdim=True).float()
            scales.copy_((largest / _LARGEST).clamp(min=_SMALLEST_SCALE))
            numbers.copy_(rows / scales)

    def unpack(self, slab: Tensor, pool: Tensor, span: Span) -> None:
        """See WireFormat."""
        num_rows = span_bytes(pool, span) // pool.element_size() // run_elements(pool, span)
        scatter(self._restored(slab, num_rows, pool.dtype).view(torch.uint8).flatten(), pool, span)

    def relative_error(self, pool: Tensor, span: Span) -> float:
        """What the way does to a span: root mean square of (received - stored) by that of what is stored."""
        slab = torch.empty(self.num_bytes(pool, span), dtype=torch.uint8, device=pool.device)
        self.pack(pool, span, slab)
        stored = self._stored(pool, span)
        received = self._restored(slab, len(stored), pool.dtype)
        return float((received.double() - stored.double()).norm() / stored.double().norm())

    def _stored(self, pool: Tensor, span: Span) -> Tensor:
        """The span's numbers, [rows, numbers of a row]."""
        stored = torch.empty(span_bytes(pool, span), dtype=torch.uint8, device=pool.device)
        gather(pool, span, stored)
        return stored.view(pool.dtype).view(-1, run_elements(pool, span))

    def _restored(self, slab: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
        """The slab's numbers as they are stored, [rows, numbers of a row]."""
        all_scales, all_numbers = self._parts(slab, num_rows)
        restored = torch.empty(all_numbers.shape, dtype=dtype, device=slab.device)
        at_once = max(1, _NUMBERS_AT_ONCE // restored.shape[1])
        parts = (torch.split(part, at_once) for part in (restored, all_scales, all_numbers))
        for rows, scales, numbers in zip(*parts, strict=True):
            rows.copy_(numbers.float() * scales)
        return restored

    def _parts(self, slab: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Views of the scales, float32 [rows, 1], and of the numbers, float8 [rows, numbers of a row]."""
        scales, numbers = slab[: num_rows * _SCALE_BYTES], slab[num_rows * _SCALE_BYTES :]
        return scales.view(torch.float32).view(-1, 1), numbers.view(torch.float8_e4m3fn).view(num_rows, -1)


def make_wire_format(wire_dtype: str) -> WireFormat:
    """Empty: as stored. Raises ConfigurationError for a name that is not known."""
    if wire_dtype == "":
        return AsStored()
    if wire_dtype == "float8_e4m3fn":
        return Float8()
    raise ConfigurationError(f"KV cannot travel as {wire_dtype}", field="transfer.wire_dtype")

"""Ends of a two-sided channel over any wire: gather -> slab -> wire -> slab -> scatter, one slab at a time."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.lane import Lane
from kv_transfer.channels.protocol import Landing, Passage, Terms
from kv_transfer.spans import span_bytes
from kv_transfer.wire_format import make_wire_format


class Wire(Protocol):
    """One direction of a pair of ranks. Slabs are uint8 [n] and match by order alone."""

    def send(self, slab: Tensor, deadline: float) -> None:
        """Blocks until the slab may be reused. Raises RuntimeError or TransferFailed, also at the deadline."""
        ...

    def receive(self, slab: Tensor, deadline: float) -> None:
        """Blocks until the slab is filled. Raises as `send`; then the slab holds garbage and is written no more."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Device work begun inside is over on exit."""
        ...

    def abort(self) -> None:
        """Ends the connection: a blocked or later call raises soon. Idempotent, from any thread."""
        ...


OpenWire = Callable[[threading.Event], Wire]


class _SlabBuffer:
    """A slab that is used again and again, since fresh memory costs page faults."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of undefined content, valid until the next call."""
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._buffer.device)
        return self._buffer[:num_bytes]


class _End:
    """What both ends share: a lane on which slabs pass through one buffer."""

    def __init__(self, terms: Terms, side: str, pool: Tensor, open_wire: OpenWire) -> None:
        self._pool = pool
        self._format = make_wire_format(terms.wire_dtype)
        self._slab = _SlabBuffer(pool.device)
        self._lane: Lane[Wire] = Lane(f"{terms.channel} {side}", open_wire)

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._lane.is_open

    def abort(self, reason: str) -> None:
        """See ReceiverEnd and SenderEnd."""
        self._lane.abort(reason)


class TwoSidedReceiver(_End):
    """The receiver's end: takes each slab off the wire, then scatters it unless its landing was revoked."""

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[Passage]":
        """See ReceiverEnd."""
        del header  # a wire without tags: order alone says which slab comes
        return self._lane.submit(partial(self._receive, destination, landing), timeout_s)

    def _receive(self, destination: Span, landing: Landing, wire: Wire, deadline: float) -> Passage:
        begun_at = time.monotonic()
        slab = self._slab.take(self._format.num_bytes(self._pool, destination))
        wire.receive(slab, deadline)
        arrived_at = time.monotonic()
        if not landing.begin_write():
            return Passage(0, begun_at, arrived_at, arrived_at)
        try:
            with wire.stream():
                self._format.unpack(slab, self._pool, destination)
        finally:
            landing.end_write()
        return Passage(span_bytes(self._pool, destination), begun_at, arrived_at, time.monotonic())


class TwoSidedSender(_End):
    """The sender's end: gathers each granted slab and puts it on the wire."""

    def send(self, header: SlabHeader, timeout_s: float) -> "Future[Passage]":
        """See SenderEnd."""
        return self._lane.submit(partial(self._send, header.source), timeout_s)

    def _send(self, source: Span, wire: Wire, deadline: float) -> Passage:
        begun_at = time.monotonic()
        slab = self._slab.take(self._format.num_bytes(self._pool, source))
        with wire.stream():
            self._format.pack(self._pool, source, slab)
        gathered_at = time.monotonic()
        wire.send(slab, deadline)
        return Passage(span_bytes(self._pool, source), begun_at, gathered_at, time.monotonic())

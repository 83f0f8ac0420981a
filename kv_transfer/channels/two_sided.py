"""Ends of a two-sided channel over any wire: gather -> slab -> wire -> slab -> scatter, in two buffers by turns.

sender     gather 0 | gather 1 | gather 2 ...           receiver   post 0, 1 |          | scatter 0, post 2 ...
wire                |  slab 0  |  slab 1  ...           wire                 |  slab 0  |  slab 1  ...
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.lane import Finish, Lane
from kv_transfer.channels.protocol import Landing, Passage, Terms
from kv_transfer.spans import span_bytes
from kv_transfer.wire_format import make_wire_format

_DEPTH = 2  # slabs on their way at a time, each in a buffer of its own


class Posted(Protocol):
    """One slab's operation that has begun."""

    def wait(self, deadline: float) -> None:
        """Blocks until it is over. Raises RuntimeError or TransferFailed, also at the deadline; the wire is of no use
        then, and once it is aborted the slab is neither read nor written any more, however often this is called.
        """
        ...


class Wire(Protocol):
    """One direction of a pair of ranks. Slabs are uint8 [n] and match by order alone."""

    def start_send(self, slab: Tensor) -> Posted:
        """The slab must not change until the operation is over. Raises as `Posted.wait`."""
        ...

    def start_receive(self, slab: Tensor) -> Posted:
        """The slab holds the peer's when the operation is over, garbage if it fails. Raises as `Posted.wait`."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Device work begun inside is over on exit; slabs on the wire do not hold it up."""
        ...

    def abort(self) -> None:
        """Ends the connection: a blocked or later call raises soon. Idempotent, from any thread."""
        ...


OpenWire = Callable[[threading.Event], Wire]


class _SlabBuffers:
    """Slabs that are used again and again, since fresh memory costs page faults."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = deque(torch.empty(0, dtype=torch.uint8, device=device) for _ in range(_DEPTH))

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of undefined content, the caller's until `_DEPTH` calls later."""
        buffer = self._buffers.popleft()
        if buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=buffer.device)
        self._buffers.append(buffer)
        return buffer[:num_bytes]


class _End:
    """What both ends share: a lane on which slabs pass through buffers by turns."""

    def __init__(self, terms: Terms, side: str, pool: Tensor, open_wire: OpenWire) -> None:
        self._pool = pool
        self._format = make_wire_format(terms.wire_dtype)
        self._buffers = _SlabBuffers(pool.device)
        self._lane: Lane[Wire] = Lane(f"{terms.channel} {side}", open_wire, _DEPTH)

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

    def _receive(self, destination: Span, landing: Landing, wire: Wire, deadline: float) -> Finish:
        begun_at = time.monotonic()
        slab = self._buffers.take(self._format.num_bytes(self._pool, destination))
        posted = wire.start_receive(slab)

        def finish() -> Passage:
            posted.wait(deadline)
            arrived_at = time.monotonic()
            if not landing.begin_write():
                return Passage(0, begun_at, arrived_at, arrived_at)
            try:
                with wire.stream():
                    self._format.unpack(slab, self._pool, destination)
            finally:
                landing.end_write()
            return Passage(span_bytes(self._pool, destination), begun_at, arrived_at, time.monotonic())

        return finish


class TwoSidedSender(_End):
    """The sender's end: gathers each granted slab and puts it on the wire."""

    def send(self, header: SlabHeader, timeout_s: float) -> "Future[Passage]":
        """See SenderEnd."""
        return self._lane.submit(partial(self._send, header.source), timeout_s)

    def _send(self, source: Span, wire: Wire, deadline: float) -> Finish:
        begun_at = time.monotonic()
        slab = self._buffers.take(self._format.num_bytes(self._pool, source))
        with wire.stream():
            self._format.pack(self._pool, source, slab)
        gathered_at = time.monotonic()
        posted = wire.start_send(slab)

        def finish() -> Passage:
            posted.wait(deadline)
            return Passage(span_bytes(self._pool, source), begun_at, gathered_at, time.monotonic())

        return finish

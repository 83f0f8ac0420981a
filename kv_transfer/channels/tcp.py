"""A two-sided channel between CPU ranks over one TCP connection, without staging.

The sender's kernel reads the runs of its pool, the receiver's writes the runs of its own. Every slab follows a frame:
its sequence number and its length. A frame that is not the expected one ends the channel before a byte lands.
"""

import struct
import threading
import time
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.lane import SHORT_BYTES, Finish, Lane
from kv_transfer.channels.protocol import Landing, Passage, Terms
from kv_transfer.channels.tcp_meeting import Reception, call
from kv_transfer.channels.tcp_stream import Runs, Stream
from kv_transfer.host_copy import HostPool
from kv_transfer.spans import span_bytes
from kv_transfer.wire_format import make_wire_format

_FRAME = struct.Struct("!QQ48x")  # sequence, bytes that follow; a cache line, so that what follows stays aligned
_SMALL_RUN_BYTES = 4096  # below it, staging costs less than listing every run
_SCRATCH_BYTES = 2**18


class _Slabs:
    """What slabs of one end look like: runs of the pool, or a staging buffer where they must be converted."""

    def __init__(self, pool: Tensor, wire_dtype: str) -> None:
        self._pool = pool
        self._in_host = HostPool(pool)
        self._format = make_wire_format(wire_dtype)
        self._is_as_stored = not wire_dtype
        self._staging = torch.empty(0, dtype=torch.uint8)

    def num_bytes(self, span: Span) -> int:
        """On the wire."""
        return self._format.num_bytes(self._pool, span)

    def in_place(self, span: Span) -> list[memoryview] | None:
        """The runs to send or to fill; None when the slab must be staged."""
        if not self._is_as_stored:
            return None
        runs = self._in_host.runs(span)
        return runs if len(runs) * _SMALL_RUN_BYTES <= self._in_host.span_bytes(span) else None

    def staging(self, span: Span) -> Tensor:
        """A slab of undefined content, valid until the next call."""
        num_bytes = self.num_bytes(span)
        if len(self._staging) < num_bytes:
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]

    def to_send(self, span: Span) -> list[memoryview]:
        """Runs that hold the slab."""
        views = self.in_place(span)
        if views is None:
            slab = self.staging(span)
            self._format.pack(self._pool, span, slab)
            views = [slab.numpy().data]
        return views

    def unpack(self, slab: Tensor, span: Span) -> None:
        """Writes a staged slab into the pool."""
        self._format.unpack(slab, self._pool, span)


class _End:
    def __init__(self, terms: Terms, pool: Tensor, lane: Lane[Stream]) -> None:
        self._pool = pool
        self._slabs = _Slabs(pool, terms.wire_dtype)
        self._lane = lane

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._lane.is_open

    def abort(self, reason: str) -> None:
        """See ReceiverEnd and SenderEnd."""
        self._lane.abort(reason)


class TcpSender(_End):
    """Puts frames and slabs on the stream."""

    def send(self, header: SlabHeader, timeout_s: float) -> "Future[Passage]":
        """See SenderEnd."""
        is_short = span_bytes(self._pool, header.source) <= SHORT_BYTES
        return self._lane.submit(partial(self._send, header), timeout_s, is_short=is_short)

    def _send(self, header: SlabHeader, stream: Stream, deadline: float) -> Passage | Finish:
        begun_at = time.monotonic()
        frame = _FRAME.pack(header.sequence, self._slabs.num_bytes(header.source))
        runs_to_send = Runs([memoryview(frame), *self._slabs.to_send(header.source)])
        gathered_at = time.monotonic()
        stream.require_peer()
        stream.send_some(runs_to_send)

        def finish() -> Passage:
            stream.send(runs_to_send, deadline)
            return Passage(span_bytes(self._pool, header.source), begun_at, gathered_at, time.monotonic())

        return finish if runs_to_send.num_bytes else finish()


class TcpReceiver(_End):
    """Takes slabs off the stream into the pool, piece by piece as they arrive, or into nowhere once revoked."""

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[Passage]":
        """See ReceiverEnd."""
        return self._lane.submit(partial(self._receive, header, destination, landing), timeout_s)

    def _receive(
        self, header: SlabHeader, destination: Span, landing: Landing, stream: Stream, deadline: float
    ) -> Passage:
        begun_at = time.monotonic()
        expected = (header.sequence, self._slabs.num_bytes(destination))
        views = self._slabs.in_place(destination)
        came = _FRAME.unpack(stream.receive(_FRAME.size, deadline))
        if came != expected:
            raise TransferFailed(f"slab {came[0]} of {came[1]} bytes came for slab {expected[0]} of {expected[1]}")
        if views is not None:
            has_landed = _land(stream, Runs(views), landing, deadline)
            arrived_at = time.monotonic()
        else:
            slab = self._slabs.staging(destination)
            _land(stream, Runs([slab.numpy().data]), Landing(), deadline)
            arrived_at = time.monotonic()
            has_landed = landing.begin_write()
            if has_landed:
                try:
                    self._slabs.unpack(slab, destination)
                finally:
                    landing.end_write()
        num_bytes = span_bytes(self._pool, destination) if has_landed else 0
        return Passage(num_bytes, begun_at, arrived_at, time.monotonic())


class TcpConnector:
    """Channels of one rank whose pool is in host memory, over the interface that has address `host`."""

    kind = "tcp"
    reach = ""

    def __init__(self, host: str, pool: Tensor, connect_timeout_s: float) -> None:
        """Raises OSError when `host`, an address of this machine, cannot be listened on."""
        self._pool = pool
        self._timeout_s = connect_timeout_s
        self._reception = Reception(host, connect_timeout_s)
        self.rendezvous = f"{host}:{self._reception.port}"

    def sender_end(self, terms: Terms) -> TcpSender:
        """See Connector."""

        def open_stream(aborted: threading.Event) -> Stream:
            return self._reception.meet(terms, aborted)

        return TcpSender(terms, self._pool, Lane(f"{terms.channel} sender", open_stream))

    def receiver_end(self, terms: Terms, rendezvous: str) -> TcpReceiver:
        """See Connector."""

        def open_stream(aborted: threading.Event) -> Stream:
            return call(rendezvous, terms, self._timeout_s, aborted)

        return TcpReceiver(terms, self._pool, Lane(f"{terms.channel} receiver", open_stream))

    def close(self) -> None:
        """Ends the listening socket; connected streams no longer need it."""
        self._reception.close()


def _land(stream: Stream, places: Runs, landing: Landing, deadline: float) -> bool:
    """Fills the places until the landing is revoked, which waits for one piece at most; the rest is read all the same.

    Returns whether all was written.
    """
    is_wanted, scratch = True, memoryview(b"")
    while places.num_bytes:
        is_wanted = is_wanted and landing.begin_write()
        if is_wanted:
            try:
                num_bytes = stream.receive_some(places.ahead())
            finally:
                landing.end_write()
        else:
            scratch = scratch or memoryview(bytearray(_SCRATCH_BYTES))
            num_bytes = stream.receive_some([scratch[: places.num_bytes]])
        places.consume(num_bytes)
        if not num_bytes:
            stream.wait_readable(places.num_bytes, deadline)
    return is_wanted

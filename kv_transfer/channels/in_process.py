"""Channels between ranks of one process: slabs pass through memory.

A Hub stands for the network; each rank makes its Connector from it. `StrictLine` (see strict.py) replaces `Line` where
a test wants NCCL's rules.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.errors import TransferFailed
from kv_transfer.channels.protocol import ChannelId, Terms
from kv_transfer.channels.two_sided import Posted, TwoSidedReceiver, TwoSidedSender, Wire


class LineLike(Protocol):
    """What joins two wires of one process."""

    def wire(self, rank: int) -> Wire:
        """The wire of rank 0 (sender) or 1 (receiver)."""
        ...


class Line:
    """Slabs on their way, oldest first, until either end aborts."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.slabs: deque[Tensor] = deque()
        self.is_aborted = False

    def wire(self, rank: int) -> Wire:
        """Both ranks use the line alike."""
        del rank
        return _LineWire(self)


class _Sent:
    def wait(self, deadline: float) -> None:
        """The line has a copy."""


@dataclass(frozen=True)
class _Awaited:
    line: Line
    slab: Tensor

    def wait(self, deadline: float) -> None:
        line = self.line
        with line.changed:
            came = line.changed.wait_for(lambda: line.slabs or line.is_aborted, deadline - time.monotonic())
            if line.is_aborted:
                raise TransferFailed("aborted")
            if not came:
                raise TransferFailed("no slab before the deadline")
            arrived = line.slabs.popleft()
        if arrived.numel() != self.slab.numel():
            raise TransferFailed(f"a slab of {arrived.numel()} bytes came where {self.slab.numel()} were expected")
        self.slab.copy_(arrived)


class _LineWire:
    def __init__(self, line: Line) -> None:
        self._line = line

    def start_send(self, slab: Tensor) -> Posted:
        with self._line.changed:  # the line is as long as the receiver's grants
            if self._line.is_aborted:
                raise TransferFailed("aborted")
            self._line.slabs.append(slab.clone())
            self._line.changed.notify_all()
        return _Sent()

    def start_receive(self, slab: Tensor) -> Posted:
        return _Awaited(self._line, slab)

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def abort(self) -> None:
        with self._line.changed:
            self._line.is_aborted = True
            self._line.changed.notify_all()


class Hub:
    """The lines of one process by channel; the second end of a channel takes its line off the table."""

    def __init__(self, make_line: Callable[[], LineLike] = Line) -> None:
        self._make_line = make_line
        self._lock = threading.Lock()
        self._half_open: dict[ChannelId, tuple[int, LineLike]] = {}

    def join(self, channel: ChannelId, rank: int) -> Wire:
        """One end's wire. The other end may come later, or never."""
        with self._lock:
            first = self._half_open.pop(channel, None)
            if first is None or first[0] == rank:
                line = self._make_line()
                self._half_open[channel] = (rank, line)
            else:
                line = first[1]
        return line.wire(rank)


class InProcessConnector:
    """Makes the ends of one rank's channels inside a Hub."""

    kind = "in_process"
    rendezvous = "in-process"

    def __init__(self, hub: Hub, pool: Tensor) -> None:
        self._hub = hub
        self._pool = pool
        self.reach = str(id(hub))

    def sender_end(self, terms: Terms) -> TwoSidedSender:
        """See Connector."""
        return TwoSidedSender(terms, "sender", self._pool, lambda _: self._hub.join(terms.channel, 0))

    def receiver_end(self, terms: Terms, rendezvous: str) -> TwoSidedReceiver:
        """See Connector."""
        del rendezvous
        return TwoSidedReceiver(terms, "receiver", self._pool, lambda _: self._hub.join(terms.channel, 1))

    def close(self) -> None:
        """Nothing is shared."""

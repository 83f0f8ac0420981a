"""What every channel offers: two ends, driven by the receiver, in one order, until the first failure.

An end is made at once and connects in its own thread; calls queue until then. `fetch` and `send` return futures that
fail with TransferFailed and cannot be cancelled: a granted slab always completes, or its channel ends.
"""

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from core.messages.to_rank import SlabHeader, Span


@dataclass(frozen=True)
class ChannelId:
    """One generation of the channel between two ranks, the same at both ends."""

    sender: str
    receiver: str
    receiver_incarnation: int
    generation: int

    def __str__(self) -> str:
        return f"{self.sender}>{self.receiver}#{self.receiver_incarnation}.{self.generation}"


class Landing:
    """The right to write into a transfer's destination blocks, shared by all its slabs; revoked once and for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_writers = 0
        self._revoked = False
        self._quiet: Future[None] = Future()

    def begin_write(self) -> bool:
        """False when revoked: the slab must be discarded. After True the writer must call `end_write`."""
        with self._lock:
            if self._revoked:
                return False
            self._num_writers += 1
            return True

    def end_write(self) -> None:
        """All bytes of one slab are in place, or never will be."""
        with self._lock:
            self._num_writers -= 1
            if self._revoked and not self._num_writers:
                self._quiet.set_result(None)

    def revoke(self) -> "Future[None]":
        """No write begins from now on; the future is done when those that had begun are over."""
        with self._lock:
            if not self._revoked:
                self._revoked = True
                if not self._num_writers:
                    self._quiet.set_result(None)
            return self._quiet


class ReceiverEnd(Protocol):
    """The end that asks."""

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        ...

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[int]":
        """Queues one slab, in the order granted to the sender; the result is the bytes written, 0 when discarded."""
        ...

    def abort(self, reason: str) -> None:
        """Fails what is queued. Blocks until the end's thread is over: no destination is written any more."""
        ...


class SenderEnd(Protocol):
    """The end that obeys."""

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        ...

    def send(self, header: SlabHeader, timeout_s: float) -> "Future[int]":
        """Queues one granted slab; the result is its bytes, known when its source is no longer read."""
        ...

    def abort(self, reason: str) -> None:
        """Fails what is queued. Blocks until the end's thread is over: no source is read any more."""
        ...


class Connector(Protocol):
    """Makes the ends of one rank's channels."""

    @property
    def rendezvous(self) -> str:
        """Where peers find this rank, carried to them by Connected."""
        ...

    def sender_end(self, channel: ChannelId) -> SenderEnd:
        """This rank's end of a channel that it sends on."""
        ...

    def receiver_end(self, channel: ChannelId, rendezvous: str) -> ReceiverEnd:
        """This rank's end of a channel that it receives on; `rendezvous` is the sender's."""
        ...

    def close(self) -> None:
        """Frees what the ends shared; they have been aborted before."""
        ...

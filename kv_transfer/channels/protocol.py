"""What every channel offers: two ends, driven by the receiver, in one order, until the first failure.

An end is made at once and connects in its own thread; calls queue until then. `fetch` and `send` return futures that
fail with TransferFailed and cannot be cancelled: a granted slab always completes, or its channel ends.
Moments are those of `time.monotonic`.
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


@dataclass(frozen=True)
class Terms:
    """What both ends of a channel agreed on over the control plane, before either reaches for the other."""

    channel: ChannelId
    token: str  # made by the sender for this channel alone; an end lets nobody in who does not know it
    wire_dtype: str = ""  # what KV is converted to on its way; empty: travels as it is stored


@dataclass(frozen=True)
class Passage:
    """One slab's way through one end.

    Sender:   begun_at -- gather --> turned_at -- wire --> done_at
    Receiver: begun_at -- wire, waiting for the sender included --> turned_at -- scatter --> done_at
    """

    num_bytes: int  # of KV, as stored: written, or read; 0 when the slab was discarded
    begun_at: float
    turned_at: float
    done_at: float


class Landing:
    """The right to write into a transfer's destination blocks, shared by all its slabs; revoked once and for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_writers = 0
        self._quiet: Future[None] | None = None  # since it was revoked

    def begin_write(self) -> bool:
        """False when revoked: the slab must be discarded. After True the writer must call `end_write`."""
        with self._lock:
            if self._quiet is not None:
                return False
            self._num_writers += 1
            return True

    def end_write(self) -> None:
        """All bytes of one slab are in place, or never will be."""
        with self._lock:
            self._num_writers -= 1
            if self._quiet is not None and not self._num_writers:
                self._quiet.set_result(None)

    def revoke(self) -> "Future[None]":
        """No write begins from now on; the future is done when those that had begun are over."""
        with self._lock:
            if self._quiet is None:
                self._quiet = Future()
                if not self._num_writers:
                    self._quiet.set_result(None)
            return self._quiet


class ReceiverEnd(Protocol):
    """The end that asks."""

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        ...

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[Passage]":
        """Queues one slab, in the order granted to the sender."""
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

    def send(self, header: SlabHeader, timeout_s: float) -> "Future[Passage]":
        """Queues one granted slab; done when its source is no longer read."""
        ...

    def abort(self, reason: str) -> None:
        """Fails what is queued. Blocks until the end's thread is over: no source is read any more."""
        ...


class Connector(Protocol):
    """One transport of one rank: makes the ends of its channels."""

    @property
    def kind(self) -> str:
        """The transport's name in configurations."""
        ...

    @property
    def reach(self) -> str:
        """Ranks of the same transport and reach can have channels; for one that crosses hosts it is empty."""
        ...

    @property
    def rendezvous(self) -> str:
        """Where peers find this rank, carried to them by Connected."""
        ...

    def sender_end(self, terms: Terms) -> SenderEnd:
        """This rank's end of a channel that it sends on."""
        ...

    def receiver_end(self, terms: Terms, rendezvous: str) -> ReceiverEnd:
        """This rank's end of a channel that it receives on; `rendezvous` is the sender's."""
        ...

    def close(self) -> None:
        """Frees what the ends shared; they have been aborted before."""
        ...

"""The receiver's end of a channel that pulls each slab out of the peer's pool, then places it.

The slab is memory of the end's own, so a pull that cannot be called back may finish late and harm nothing: the
destination is written only once the slab is whole and unless its landing was revoked.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from torch import Tensor

from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.lane import Lane
from kv_transfer.channels.protocol import Landing, Passage
from kv_transfer.spans import scatter, span_bytes


class PeerPool(Protocol):
    """The pool of a peer, within reach."""

    def pull(self, source: Span, deadline: float) -> Tensor:
        """The span's bytes in `gather`'s order, uint8 [span_bytes], valid until the next call.

        Blocks. Raises RuntimeError or TransferFailed, also at the deadline and for a span outside of the pool.
        """
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Device work begun inside is over on exit."""
        ...

    def abort(self) -> None:
        """A blocked or later `pull` raises soon. Idempotent, from any thread."""
        ...


class PullingReceiver:
    """Pulls slabs in their order, in a thread of its own."""

    def __init__(self, name: str, pool: Tensor, open_peer: Callable[[threading.Event], PeerPool]) -> None:
        """`open_peer` runs in the thread; it raises when the peer's pool is out of reach or does not fit."""
        self._pool = pool
        self._lane: Lane[PeerPool] = Lane(name, open_peer)

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._lane.is_open

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[Passage]":
        """See ReceiverEnd."""
        return self._lane.submit(partial(self._pull, header.source, destination, landing), timeout_s)

    def abort(self, reason: str) -> None:
        """See ReceiverEnd."""
        self._lane.abort(reason)

    def _pull(self, source: Span, destination: Span, landing: Landing, peer: PeerPool, deadline: float) -> Passage:
        begun_at = time.monotonic()
        slab = peer.pull(source, deadline)
        arrived_at = time.monotonic()
        if not landing.begin_write():
            return Passage(0, begun_at, arrived_at, arrived_at)
        try:
            with peer.stream():
                scatter(slab, self._pool, destination)
        finally:
            landing.end_write()
        return Passage(span_bytes(self._pool, destination), begun_at, arrived_at, time.monotonic())

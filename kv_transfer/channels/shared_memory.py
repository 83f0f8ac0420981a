"""A one-sided channel between CPU ranks of one host: the receiver maps the sender's pool and copies directly.

The sender's pool must lie in shared memory, a file that the receiver may open. Its rendezvous tells path and shape:
`/dev/shm/pool:16,256,2,8,16,64`. The sender has nothing to do for a granted slab; its blocks stay read until the
receiver says so by releasing the request.
"""

import os
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from math import prod
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.lane import SHORT_BYTES, Lane
from kv_transfer.channels.protocol import Landing, Passage, Terms
from kv_transfer.host_copy import HostPool, copy
from kv_transfer.spans import require_inside, span_bytes

_MADV_POPULATE_READ = 22  # linux/mman.h
_POPULATE_BYTES = 2**26  # at a time, between looks at the clock
_POPULATE_S = 0.5  # about 4 GiB when their owner has written them


class _PeerPool:
    """A mapped pool; nothing about it blocks."""

    def __init__(self, pool: Tensor) -> None:
        self.pool = HostPool(pool)

    def abort(self) -> None:
        """Nothing to wake."""


class OneSidedReceiver:
    """Copies each slab from the peer's pool in its turn; larger ones in a thread of its own."""

    def __init__(self, name: str, pool: Tensor, rendezvous: str) -> None:
        self._pool = HostPool(pool)
        self._lane: Lane[_PeerPool] = Lane(name, partial(_map_pool, rendezvous, pool.dtype))

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._lane.is_open

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[Passage]":
        """See ReceiverEnd."""
        is_short = self._pool.span_bytes(destination) <= SHORT_BYTES
        return self._lane.submit(partial(self._copy, header.source, destination, landing), timeout_s, is_short=is_short)

    def abort(self, reason: str) -> None:
        """See ReceiverEnd."""
        self._lane.abort(reason)

    def _copy(self, source: Span, destination: Span, landing: Landing, peer: _PeerPool, deadline: float) -> Passage:
        del deadline  # a copy waits for nobody
        begun_at = time.monotonic()
        require_inside(peer.pool, source)
        if not landing.begin_write():
            return Passage(0, begun_at, begun_at, begun_at)
        try:
            num_bytes = copy(peer.pool, source, self._pool, destination)
        finally:
            landing.end_write()
        copied_at = time.monotonic()
        return Passage(num_bytes, begun_at, copied_at, copied_at)


class OneSidedSender:
    """Lets the receiver read; knows only whether the channel is open."""

    def __init__(self, name: str, pool: Tensor) -> None:
        self._name = name
        self._pool = pool
        self._failure: TransferFailed | None = None

    @property
    def is_open(self) -> bool:
        """False after an abort."""
        return self._failure is None

    def send(self, header: SlabHeader, timeout_s: float) -> "Future[Passage]":
        """See SenderEnd; done at once, since this end does not read."""
        del timeout_s
        future: Future[Passage] = Future()
        if self._failure is not None:
            future.set_exception(self._failure)
        else:
            now = time.monotonic()
            future.set_result(Passage(span_bytes(self._pool, header.source), now, now, now))
        return future

    def abort(self, reason: str) -> None:
        """See SenderEnd."""
        self._failure = self._failure or TransferFailed(f"channel {self._name}: {reason}")


class SharedMemoryConnector:
    """Makes the ends of one rank's channels to ranks of the same host."""

    kind = "shared_memory"

    def __init__(self, pool: Tensor, path: Path) -> None:
        """`path` is the file that holds `pool`, from its first byte on."""
        self._pool = pool
        self._path = path

    @property
    def reach(self) -> str:
        """This boot of this host's kernel, and the namespace inside which a process is known by the same number."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} pid:{Path('/proc/self/ns/pid').stat().st_ino}"

    @property
    def rendezvous(self) -> str:
        """path:shape of the pool."""
        return f"{self._path}:{','.join(map(str, self._pool.shape))}"

    def sender_end(self, terms: Terms) -> OneSidedSender:
        """See Connector."""
        return OneSidedSender(f"{terms.channel} sender", self._pool)

    def receiver_end(self, terms: Terms, rendezvous: str) -> OneSidedReceiver:
        """See Connector."""
        return OneSidedReceiver(f"{terms.channel} receiver", self._pool, rendezvous)

    def close(self) -> None:
        """The pool's owner frees it."""


def _map_pool(rendezvous: str, dtype: torch.dtype, aborted: threading.Event) -> _PeerPool:
    """Raises OSError when the file is gone, TransferFailed when it is shorter than the pool."""
    path, shape = rendezvous.rsplit(":", 1)
    sizes = [int(size) for size in shape.split(",")]
    num_bytes = prod(sizes) * dtype.itemsize
    with Path(path).open("r+b") as file:
        if os.fstat(file.fileno()).st_size < num_bytes:
            raise TransferFailed(f"{path} is shorter than a pool of shape {shape}")
        mapped = mmap(file.fileno(), num_bytes)
    _map_pages(mapped, aborted)
    return _PeerPool(torch.frombuffer(mapped, dtype=dtype).view(sizes))


def _map_pages(mapped: mmap, aborted: threading.Event) -> None:
    """Maps pages in before the first slab comes, for a short while: copying through unmapped ones takes twice."""
    deadline = time.monotonic() + _POPULATE_S
    for start in range(0, len(mapped), _POPULATE_BYTES):
        if aborted.is_set() or time.monotonic() > deadline:
            return
        with suppress(OSError):  # Linux before 5.14 maps each page when it is first read
            mapped.madvise(_MADV_POPULATE_READ, start, min(_POPULATE_BYTES, len(mapped) - start))

"""The wire over ProcessGroupNCCL: GPU to GPU, slabs gathered and scattered on the device.

Every wire has a CUDA stream of its own, never the engine's. An operation is known to be over by an event on that
stream, polled until the deadline. A dead peer's kernel spins until this end aborts; only then, and once the stream has
drained, is the slab free again.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupNCCL, Store  # type: ignore[attr-defined]

from core.errors import TransferFailed
from kv_transfer.channels.rendezvous import SENDER, GroupConnector

_POLL_S = 50e-6
_NEVER = timedelta(days=1)  # deadlines are this wire's; torch's own would dump traces and end the process
_MAX_CTAS = 8  # thread blocks, and about 52 MB of device memory, per pair


class NcclWire:
    """Rank 0 sends, rank 1 receives. Made in the thread that uses it; only `abort` comes from others."""

    def __init__(self, store: Store, rank: int, device: torch.device) -> None:
        """Blocks until the peer does the same; raises RuntimeError."""
        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        options.config.max_ctas = _MAX_CTAS
        self._group: Any = ProcessGroupNCCL(store, rank, 2, options)  # torch's stubs leave send and recv out
        self._group.eager_connect_single_device(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._is_aborted = False
        self._warm_up(rank, device)

    def send(self, slab: Tensor, deadline: float) -> None:
        """See Wire."""
        with torch.cuda.stream(self._stream):
            self._finish(self._group.send([slab], self._peer, 0), deadline)

    def receive(self, slab: Tensor, deadline: float) -> None:
        """See Wire."""
        with torch.cuda.stream(self._stream):
            self._finish(self._group.recv([slab], self._peer, 0), deadline)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Runs device work on the wire's stream and waits for it."""
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def abort(self) -> None:
        """See Wire."""
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        with suppress(RuntimeError):  # the communicator may have ended by its own error
            self._group.abort()

    def _finish(self, work: Any, deadline: float) -> None:
        """Waits for an operation begun on the wire's stream; on failure aborts and drains the stream first."""
        work.wait()  # makes the stream wait, not this thread
        over: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        over.record(self._stream)
        while not over.query():
            if time.monotonic() > deadline:
                self.abort()
            if self._is_aborted:
                break
            time.sleep(_POLL_S)
        if self._is_aborted:
            self._stream.synchronize()
            raise TransferFailed("aborted, or not over before the deadline")

    def _warm_up(self, rank: int, device: torch.device) -> None:
        """Sends one byte, so that all lazy set-up is over before the first grant and before any graph capture."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()
        deadline = time.monotonic() + 30
        if rank == SENDER:
            self.send(byte, deadline)
        else:
            self.receive(byte, deadline)


def nccl_connector(host: str, pool: Tensor, connect_timeout_s: float) -> GroupConnector:
    """Channels of one rank whose pool is on a CUDA device; `host` is the address of the rendezvous store.

    Turns torch's NCCL error handling off for groups made later in this process: its watchdog would end the process,
    or abort a communicator so that a broken slab looks complete. This wire aborts by itself.
    """
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0")

    def make_wire(store: Store, rank: int) -> NcclWire:
        return NcclWire(store, rank, pool.device)

    return GroupConnector("nccl", host, pool, make_wire, connect_timeout_s)

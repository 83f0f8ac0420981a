"""The wire over ProcessGroupNCCL: GPU to GPU, slabs gathered and scattered on the device.

Every wire has a CUDA stream of its own, never the engine's, and another for gathering and scattering, so that a slab's
copies overlap another slab's way. A slab goes on the wire when its gather is over. An operation is known to be over by
an event on the wire's stream, polled until the deadline. A dead peer's kernel spins until this end aborts; only then,
and once the stream has drained, are its slabs free again.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupNCCL, Store  # type: ignore[attr-defined]

from core.errors import TransferFailed
from kv_transfer.channels.rendezvous import SENDER, GroupConnector
from kv_transfer.channels.two_sided import Posted

_POLL_S = 50e-6
_NEVER = timedelta(days=1)  # deadlines are this wire's; torch's own would dump traces and end the process
_MAX_CTAS = 8  # thread blocks, and about 52 MB of device memory, per pair


@dataclass(frozen=True)
class _NcclOperation:
    wire: "NcclWire"
    over: Any

    def wait(self, deadline: float) -> None:
        self.wire.finish(self.over, deadline)


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
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._is_aborted = False
        self._warm_up(rank, device)

    def start_send(self, slab: Tensor) -> Posted:
        """See Wire."""
        with torch.cuda.stream(self._stream):
            return self._posted(self._group.send([slab], self._peer, 0))

    def start_receive(self, slab: Tensor) -> Posted:
        """See Wire."""
        with torch.cuda.stream(self._stream):
            return self._posted(self._group.recv([slab], self._peer, 0))

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Runs device work on a stream beside the wire's and waits for it."""
        with torch.cuda.stream(self._copies):
            yield
        self._copies.synchronize()

    def finish(self, over: Any, deadline: float) -> None:
        """Waits for an event of the wire's stream; on failure aborts and drains the stream first."""
        while not over.query():
            if time.monotonic() > deadline:
                self.abort()
            if self._is_aborted:
                break
            time.sleep(_POLL_S)
        if self._is_aborted:
            self._stream.synchronize()
            raise TransferFailed("aborted, or not over before the deadline")

    def abort(self) -> None:
        """See Wire."""
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        with suppress(RuntimeError):  # the communicator may have ended by its own error
            self._group.abort()

    def _posted(self, work: Any) -> Posted:
        """Called with the wire's stream current."""
        work.wait()  # makes the stream wait, not this thread
        over: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        over.record(self._stream)
        return _NcclOperation(self, over)

    def _warm_up(self, rank: int, device: torch.device) -> None:
        """Sends one byte, so that all lazy set-up is over before the first grant and before any graph capture."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()
        deadline = time.monotonic() + 30
        if rank == SENDER:
            self.start_send(byte).wait(deadline)
        else:
            self.start_receive(byte).wait(deadline)


def nccl_connector(host: str, pool: Tensor, connect_timeout_s: float) -> GroupConnector:
    """Channels of one rank whose pool is on a CUDA device; `host` is the address of the rendezvous store.

    Turns torch's NCCL error handling off for groups made later in this process: its watchdog would end the process,
    or abort a communicator so that a broken slab looks complete. This wire aborts by itself.
    """
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0")

    def make_wire(store: Store, rank: int) -> NcclWire:
        return NcclWire(store, rank, pool.device)

    return GroupConnector("nccl", host, pool, make_wire, connect_timeout_s)

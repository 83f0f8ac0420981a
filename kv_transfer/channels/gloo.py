"""The wire over ProcessGroupGloo: TCP between CPU ranks.

A timed-out wait closes Gloo's pair for good, at both ends. That is the deadline's effect, and also how `abort` ends
another thread's blocked wait: it lets a wait of its own time out. A message longer than the posted buffer would end
the process, so a slab's size is its tag: unequal slabs wait for each other until the deadline.
"""

import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from kv_transfer.channels.rendezvous import GroupConnector
from kv_transfer.channels.two_sided import Posted

_ABORT_TAG = 0  # no slab is empty
_MOMENT = timedelta(milliseconds=1)


class _GlooOperation:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, deadline: float) -> None:
        self._work.wait(max(_MOMENT, timedelta(seconds=deadline - time.monotonic())))


class GlooWire:
    """Rank 0 sends, rank 1 receives."""

    def __init__(self, store: Store, rank: int, device: ProcessGroupGloo.Device, connect_timeout_s: float) -> None:
        """Blocks until the peer does the same. One `device` serves all groups of a process."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=connect_timeout_s)
        options._devices = [device]
        options._threads = 1
        self._group: Any = ProcessGroupGloo(store, rank, 2, options)  # torch's stubs leave send and recv out
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._is_aborted = False

    def start_send(self, slab: Tensor) -> Posted:
        """See Wire."""
        return _GlooOperation(self._group.send([slab], self._peer, slab.numel()))

    def start_receive(self, slab: Tensor) -> Posted:
        """See Wire."""
        return _GlooOperation(self._group.recv([slab], self._peer, slab.numel()))

    def stream(self) -> AbstractContextManager[None]:
        """The CPU works in order."""
        return nullcontext()

    def abort(self) -> None:
        """See Wire."""
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._peer, _ABORT_TAG).wait(_MOMENT)


def gloo_connector(host: str, pool: Tensor, connect_timeout_s: float) -> GroupConnector:
    """Channels of one rank, over the network interface that has address `host`."""
    device = ProcessGroupGloo.create_device(hostname=host)

    def make_wire(store: Store, rank: int) -> GlooWire:
        return GlooWire(store, rank, device, connect_timeout_s)

    return GroupConnector("gloo", host, pool, make_wire, connect_timeout_s)

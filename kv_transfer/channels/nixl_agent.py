"""A rank's NIXL agent: its registered memory, its peers, its reads, and what it cannot let go of yet.

Measured with NIXL 1.5.1 over UCX: a read that was posted cannot be called back. Neither releasing its handle nor
removing the peer keeps late bytes out of the local memory, so the slab of a read that is given up is kept until the
read is over, or the agent gone.
"""

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
from torch import Tensor

from kv_transfer.runs import Runs

log = logging.getLogger(__name__)

UNDER_WAY = "PROC"
DONE = "DONE"
_BACKEND = "UCX"


@dataclass(frozen=True)
class NixlPlace:
    """Where a pool lies, and the agent that lets peers read it."""

    name: str  # of the agent, unique
    metadata: bytes  # of the agent, with the keys of its memory
    address: int
    gpu: int


@dataclass
class Slab:
    """Registered memory that reads fill."""

    memory: Tensor
    registration: Any


class Agent:
    """Called from any thread. `register`, `join` and `begin` raise NIXL's errors, which have no base but Exception."""

    def __init__(self, pool: Tensor) -> None:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it prints to stdout by itself
        config = nixl_agent_config(backends=[_BACKEND], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
        self._nixl: Any = nixl_agent(uuid.uuid4().hex, config)
        if _BACKEND not in self._nixl.backends:
            raise RuntimeError(f"NIXL has no backend {_BACKEND} here")
        self._memory_type = "VRAM" if pool.is_cuda else "DRAM"
        self._gpu = pool.device.index or 0
        self._lock = threading.Lock()
        self._num_users: Counter[str] = Counter()
        self._given_up: list[tuple[Any, Slab, str]] = []  # (read, slab, peer)
        self._pool = self.register(pool)
        self._place = NixlPlace(self._nixl.name, self._nixl.get_agent_metadata(), pool.data_ptr(), self._gpu)

    @property
    def place(self) -> NixlPlace:
        """Of the pool; slabs are not among it."""
        return self._place

    def register(self, memory: Tensor) -> Slab:
        """Lets reads fill it, and peers read it whom metadata of later tells so."""
        place = [(memory.data_ptr(), memory.numel() * memory.element_size(), self._gpu, "")]
        return Slab(memory, self._nixl.register_memory(place, self._memory_type))

    def deregister(self, slab: Slab) -> None:
        """No read of it is under way."""
        with suppress(Exception):
            self._nixl.deregister_memory(slab.registration)

    def join(self, peer: NixlPlace) -> None:
        """Connects to a peer. Every `join` is followed by one `leave`."""
        with self._lock:
            self._let_go()
            if not self._num_users[peer.name]:  # adding it again would disturb its reads
                self._nixl.add_remote_agent(peer.metadata)
            self._num_users[peer.name] += 1

    def leave(self, peer: NixlPlace) -> None:
        """The last user's leave disconnects."""
        with self._lock:
            self._leave(peer.name)

    def begin(self, peer: NixlPlace, runs: Runs, slab: Tensor) -> tuple[Any, str]:
        """Posts a read of a peer's runs into a slab; returns the read and its state."""
        ours = _descriptors(slab.data_ptr(), np.cumsum(runs.lengths) - runs.lengths, runs.lengths, self._gpu)
        theirs = _descriptors(peer.address, runs.starts, runs.lengths, peer.gpu)
        to_slab, from_peer = (self._nixl.get_xfer_descs(table, self._memory_type) for table in (ours, theirs))
        read = self._nixl.initialize_xfer("READ", to_slab, from_peer, peer.name)
        return read, _or_failed(self._nixl.transfer, read)

    def state(self, read: Any) -> str:
        """UNDER_WAY, then DONE or what says that it failed."""
        return _or_failed(self._nixl.check_xfer_state, read)

    def release(self, read: Any) -> None:
        """Of a read that is over."""
        self._nixl.release_xfer_handle(read)

    def give_up(self, read: Any, slab: Slab, peer: NixlPlace) -> None:
        """Keeps what a read may still write to, and the peer, without whom nothing tells when it is over."""
        with self._lock:
            self._num_users[peer.name] += 1
            self._given_up.append((read, slab, peer.name))

    def close(self) -> None:
        """Ends the agent, and with it every read."""
        with self._lock:
            self.deregister(self._pool)
            slabs = [slab for _, slab, _ in self._given_up]
            self._given_up.clear()  # a read releases itself
            self._nixl = None
            slabs.clear()  # only now nothing writes to them

    def _let_go(self) -> None:
        """Of what was given up and is over by now. Called with the lock held."""
        kept = []
        for read, slab, name in self._given_up:
            if self.state(read) == UNDER_WAY:
                kept.append((read, slab, name))
                continue
            self.release(read)
            self.deregister(slab)
            self._leave(name)
        self._given_up = kept

    def _leave(self, name: str) -> None:
        """Called with the lock held."""
        self._num_users[name] -= 1
        if not self._num_users[name]:
            with suppress(Exception):  # the peer may be gone
                self._nixl.remove_remote_agent(name)


def _or_failed(act: Callable[[Any], str], read: Any) -> str:
    try:
        return act(read)
    except Exception as error:
        log.debug("NIXL: %s", error)
        return "ERR"


def _descriptors(address: int, starts: Any, lengths: Any, gpu: int) -> "np.ndarray[Any, Any]":
    """NIXL's table of (address, bytes, device)."""
    return np.stack([address + starts, lengths, np.full_like(lengths, gpu)], axis=1).astype(np.uint64)

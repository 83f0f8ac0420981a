"""A one-sided channel over NIXL, NVIDIA's transfer library (extra `nixl`): RDMA, NVLink, shared memory or TCP.

Each slab is read into registered memory of the channel's own: see nixl_agent.py for why not into its destination.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigurationError, TransferFailed
from core.messages.to_rank import Span
from kv_transfer.channels.nixl_agent import DONE, UNDER_WAY, Agent, NixlPlace, Slab
from kv_transfer.channels.one_sided import PullingReceiver
from kv_transfer.channels.pool_handle import PoolHandle
from kv_transfer.channels.protocol import Terms
from kv_transfer.channels.shared_memory import OneSidedSender
from kv_transfer.runs import runs_of
from kv_transfer.spans import require_inside, span_bytes

_POLL_S = 20e-6


class NixlConnector:
    """Makes the ends of one rank's channels, to any host that UCX reaches."""

    kind = "nixl"
    reach = ""

    def __init__(self, pool: Tensor) -> None:
        """Raises ConfigurationError when NIXL cannot register the pool."""
        self._pool = pool
        try:
            self._agent = Agent(pool)
        except Exception as error:  # NIXL's errors have no base of their own
            raise ConfigurationError(f"NIXL does not work here: {error}", field="channel") from error

    @property
    def rendezvous(self) -> str:
        """What lets a peer read the pool."""
        return PoolHandle.of(self._pool, self._agent.place).encode()

    def sender_end(self, terms: Terms) -> OneSidedSender:
        """See Connector."""
        return OneSidedSender(f"{terms.channel} sender", self._pool)

    def receiver_end(self, terms: Terms, rendezvous: str) -> PullingReceiver:
        """See Connector."""

        def open_peer(aborted: threading.Event) -> _Peer:
            return _Peer(self._agent, PoolHandle.decode(rendezvous, NixlPlace), self._pool, aborted)

        return PullingReceiver(f"{terms.channel} receiver", self._pool, open_peer)

    def close(self) -> None:
        """See Connector."""
        self._agent.close()


class _Peer:
    """A peer's pool within NIXL's reach."""

    def __init__(self, agent: Agent, told: PoolHandle[NixlPlace], pool: Tensor, aborted: threading.Event) -> None:
        """Raises TransferFailed for a pool that does not fit, or whom NIXL cannot connect to."""
        self._shape = told.require_fits(pool)
        self._agent = agent
        self._peer = told.place
        self._aborted = aborted
        self._device = pool.device
        self._stream: Any = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]
        self._slab: Slab | None = None
        self._pulling = threading.Lock()
        self._is_over = False
        agent.join(told.place)

    def pull(self, source: Span, deadline: float) -> Tensor:
        """See PeerPool."""
        with self._pulling:
            require_inside(self._shape, source)
            if self._aborted.is_set():
                raise TransferFailed("aborted")
            num_bytes = span_bytes(self._shape, source)
            slab = self._take(num_bytes)
            filled = slab.memory[:num_bytes]
            read, state = self._agent.begin(self._peer, runs_of(self._shape, source), filled)
            while state == UNDER_WAY and not self._aborted.is_set() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                state = self._agent.state(read)
            if state != DONE:
                self._slab = None
                self._agent.give_up(read, slab, self._peer)
                raise TransferFailed(f"aborted, or not over before the deadline, or failed: {state}")
            self._agent.release(read)
            return filled

    @contextmanager
    def stream(self) -> Iterator[None]:
        """See PeerPool."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def abort(self) -> None:
        """The lane's event ends a pull; then the peer is left."""
        with self._pulling:
            if self._is_over:
                return
            self._is_over = True
            if self._slab is not None:
                self._agent.deregister(self._slab)
            self._agent.leave(self._peer)

    def _take(self, num_bytes: int) -> Slab:
        if self._slab is None or self._slab.memory.numel() < num_bytes:
            if self._slab is not None:
                self._agent.deregister(self._slab)
            self._slab = self._agent.register(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
        return self._slab

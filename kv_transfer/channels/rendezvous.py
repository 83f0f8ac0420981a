"""Where the two ends of a 2-rank process group meet: the sender's TCP store, one prefix per channel generation.

torch's store is open to anyone who reaches its port: whoever does can list, read, set and delete every key. So the
token never lies in it. What an end says there before the set-up is sealed with the token (RFC 2104), and no end enters
the set-up on another word: who lacks the token meets nobody here, and can but keep two ends apart, which then fail.

It holds no further. The set-up itself is the backend's: Gloo and NCCL tell each other through the store where they
listen, NCCL also the number by which it knows its peers, and they ask nothing else of whoever connects. A stranger who
reads or rewrites that in the moment of a set-up may take a peer's place, and so read KV or put in its own. So these
ports belong on a network without strangers; on CPU, channel `tcp` has ends that prove to know the token throughout.
"""

import hmac
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from core.errors import TransferFailed
from kv_transfer.channels.protocol import Terms
from kv_transfer.channels.two_sided import TwoSidedReceiver, TwoSidedSender, Wire

SENDER, RECEIVER = 0, 1  # ranks inside the group
_POLL_S = 0.002
_TRY_S = 0.5

MakeWire = Callable[[Store, int], Wire]  # (store of this channel alone, own rank); both ranks call it together


class GroupConnector:
    """Makes channel ends over 2-rank groups of any torch.distributed backend.

    Hosts one store for all channels that this rank sends on. Every end uses a store connection of its own, since a
    blocked call holds its connection's lock.
    """

    reach = ""

    def __init__(self, kind: str, host: str, pool: Tensor, make_wire: MakeWire, connect_timeout_s: float) -> None:
        """Raises RuntimeError or OSError when `host`, an address of this machine, cannot be listened on."""
        self.kind = kind
        self._host = host
        self._pool = pool
        self._make_wire = make_wire
        self._timeout_s = connect_timeout_s
        self._store: Any = _persist(connect_timeout_s, self._host_store)

    @property
    def rendezvous(self) -> str:
        """host:port of the store."""
        return f"{self._host}:{self._store.port}"

    def sender_end(self, terms: Terms) -> TwoSidedSender:
        """See Connector."""

        def open_wire(aborted: threading.Event) -> Wire:
            store = self._reach_store(self._host, self._store.port)
            return self._meet(store, terms, SENDER, aborted)

        return TwoSidedSender(terms, "sender", self._pool, open_wire)

    def receiver_end(self, terms: Terms, rendezvous: str) -> TwoSidedReceiver:
        """See Connector."""
        host, port = rendezvous.rsplit(":", 1)

        def open_wire(aborted: threading.Event) -> Wire:
            store = self._reach_store(host, int(port))
            return self._meet(store, terms, RECEIVER, aborted)

        return TwoSidedReceiver(terms, "receiver", self._pool, open_wire)

    def close(self) -> None:
        """Ends the store; existing groups no longer need it."""
        self._store = None

    def _host_store(self, timeout: timedelta) -> Store:
        """A store that listens on this host's address alone, on a free port."""
        listener = socket.create_server((self._host, 0))
        port, descriptor = listener.getsockname()[1], listener.detach()
        return TCPStore(
            self._host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
        )

    def _reach_store(self, host: str, port: int) -> Store:
        """A connection of one's own to a store."""

        def connect(timeout: timedelta) -> Store:
            return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

        return _persist(self._timeout_s, connect)

    def _meet(self, store: Store, terms: Terms, rank: int, aborted: threading.Event) -> Wire:
        """Waits, abortably, until both ends are there; only then the backend's own blocking set-up begins.

        The store holds one verdict, and its first writer decides for both: the receiver writes "go" when it has seen
        the sender waiting, the sender writes "off" when it gives up. So no end enters the set-up alone.
        """
        private: Any = PrefixStore(_sealed(terms, "room"), store)
        waiting, go, off = (_sealed(terms, word) for word in ("waiting", "go", "off"))
        if rank == SENDER:
            private.set("waiting", waiting)
            has_come = self._await(private, "verdict", aborted)
            verdict = private.get("verdict") if has_come else private.compare_set("verdict", "", off)
        else:
            if not self._await(private, "waiting", aborted):
                raise TransferFailed(self._absence(aborted))
            _require(private.get("waiting"), waiting)
            verdict = private.compare_set("verdict", "", go)
        if verdict == off.encode():
            raise TransferFailed(self._absence(aborted))
        _require(verdict, go)
        return self._make_wire(private, rank)

    def _await(self, store: Any, key: str, aborted: threading.Event) -> bool:
        """Whether the key came before the deadline or an abort."""
        deadline = time.monotonic() + self._timeout_s
        while not store.check([key]):
            if aborted.wait(_POLL_S) or time.monotonic() > deadline:
                return False
        return True

    def _absence(self, aborted: threading.Event) -> str:
        return "aborted while connecting" if aborted.is_set() else f"the peer did not connect in {self._timeout_s} s"


def _sealed(terms: Terms, word: str) -> str:
    """What only those can write who know the token, and what tells others neither the token nor the channel."""
    return hmac.digest(terms.token.encode(), f"{word} {terms.channel}".encode(), "sha256").hex()


def _require(said: bytes, sealed: str) -> None:
    """Raises TransferFailed for what came from somebody without the token."""
    if not hmac.compare_digest(said, sealed.encode()):
        raise TransferFailed("a stranger wrote to the rendezvous store")


def _persist(timeout_s: float, connect: Callable[[timedelta], Store]) -> Store:
    """Connects in short tries: torch's client misses a listening store now and then, and would wait in vain.

    Raises RuntimeError when `timeout_s` is over.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            store = connect(timedelta(seconds=min(_TRY_S, timeout_s)))
        except RuntimeError:
            if time.monotonic() >= deadline:
                raise
        else:
            store.set_timeout(timedelta(seconds=timeout_s))
            return store

"""Where the ends of TCP channels meet: at the sender's listening socket, each proving that it knows the token.

    receiver                                 sender
    hello: magic, channel, proof  -------->  looks for the channel; whoever is first waits for the other
    reads the welcome             <--------  welcome: a proof of its own

A hello that is wrong, slow, or for a channel that nobody opens in time, is dropped; nobody else notices.
"""

import hashlib
import hmac
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from core.errors import TransferFailed
from kv_transfer.channels.protocol import Terms
from kv_transfer.channels.tcp_stream import Runs, Stream, connect, suit_one_host

_MAGIC = b"baton-kv"
_DIGEST_BYTES = hashlib.sha256().digest_size
_HELLO_BYTES = len(_MAGIC) + 2 * _DIGEST_BYTES
_MAX_CALLERS = 1024
_LOOK_S = 0.02  # between looks at the abort flag while nobody calls


@dataclass(eq=False)
class _Caller:
    socket: socket.socket
    deadline: float
    hello: bytearray = field(default_factory=bytearray)

    @property
    def channel(self) -> bytes:
        """Digest of the channel it wants."""
        return bytes(self.hello[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES])

    @property
    def proof(self) -> bytes:
        """What it offers as proof."""
        return bytes(self.hello[len(_MAGIC) + _DIGEST_BYTES :])


class Reception:
    """Listens on one address for the receivers of all channels that a rank sends on."""

    def __init__(self, host: str, timeout_s: float) -> None:
        """`timeout_s` is how long either end waits for the other. Raises OSError when `host` cannot be listened on."""
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=_MAX_CALLERS)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._timeout_s = timeout_s
        self._wake, self._woken = socket.socketpair()
        self._arrived = threading.Condition()
        self._callers: list[_Caller] = []  # all, whether their hello is complete or not; oldest first
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name=f"reception {host}:{self.port}", daemon=True)
        self._thread.start()

    def meet(self, terms: Terms, aborted: threading.Event) -> Stream:
        """The channel's receiver, welcomed. Raises TransferFailed or OSError."""
        deadline = time.monotonic() + self._timeout_s
        with self._arrived:
            while (caller := self._take(terms)) is None:
                if aborted.is_set() or time.monotonic() > deadline:
                    raise TransferFailed(absence(aborted, self._timeout_s))
                self._arrived.wait(_LOOK_S)
        stream = Stream(caller.socket, aborted)
        try:
            suit_one_host(caller.socket)
            stream.send(Runs([memoryview(_proof(terms, "sender"))]), deadline)
        except BaseException:
            stream.abort()
            raise
        return stream

    def close(self) -> None:
        """Drops whoever still waits; streams that were handed out stay."""
        self._wake.close()
        self._thread.join()

    def _take(self, terms: Terms) -> _Caller | None:
        """A caller for this channel who knows the token; others for this channel are dropped."""
        channel, proof = _digest(terms), _proof(terms, "receiver")
        for caller in [caller for caller in self._callers if caller.channel == channel]:
            if len(caller.hello) == _HELLO_BYTES:
                self._callers.remove(caller)
                if hmac.compare_digest(caller.proof, proof):
                    return caller
                caller.socket.close()
        return None

    def _run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select(self._timeout_s / 4):
                if key.fileobj is self._woken:
                    self._end()
                    return
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._drop(time.monotonic(), _MAX_CALLERS)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone already, or there are no descriptors left: the next one may have more luck
            return
        connection.setblocking(False)
        caller = _Caller(connection, time.monotonic() + self._timeout_s)
        with self._arrived:
            self._callers.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)

    def _read(self, caller: _Caller) -> None:
        """Takes what has come of a hello; a complete one is left to `meet`."""
        try:
            part = caller.socket.recv(_HELLO_BYTES - len(caller.hello))
        except OSError:
            part = b""
        caller.hello += part
        is_well = bool(part) and caller.hello[: len(_MAGIC)] == _MAGIC[: len(caller.hello)]
        if is_well and len(caller.hello) < _HELLO_BYTES:
            return
        self._selector.unregister(caller.socket)
        with self._arrived:
            if is_well:
                self._arrived.notify_all()
            else:
                self._callers.remove(caller)
                caller.socket.close()

    def _drop(self, now: float, num_kept: int) -> None:
        """Drops those who came too long ago, and the oldest beyond `num_kept`."""
        with self._arrived:
            while self._callers and (self._callers[0].deadline < now or len(self._callers) > num_kept):
                caller = self._callers.pop(0)
                if len(caller.hello) < _HELLO_BYTES:
                    self._selector.unregister(caller.socket)
                caller.socket.close()

    def _end(self) -> None:
        self._drop(0.0, 0)
        self._selector.close()
        self._listener.close()
        self._woken.close()


def call(rendezvous: str, terms: Terms, timeout_s: float, aborted: threading.Event) -> Stream:
    """The receiver's way to the sender at host:port. Raises TransferFailed or OSError."""
    deadline = time.monotonic() + timeout_s
    host, port = rendezvous.rsplit(":", 1)
    stream = connect(host, int(port), deadline, aborted)
    try:
        hello = _MAGIC + _digest(terms) + _proof(terms, "receiver")
        stream.send(Runs([memoryview(hello)]), deadline)
        welcome = stream.receive(_DIGEST_BYTES, deadline)
        if not hmac.compare_digest(welcome, _proof(terms, "sender")):
            raise TransferFailed(f"{rendezvous} does not know the token of {terms.channel}")
    except BaseException:
        stream.abort()
        raise
    return stream


def absence(aborted: threading.Event, timeout_s: float) -> str:
    """Why the other end is not there."""
    return "aborted while connecting" if aborted.is_set() else f"the peer did not connect in {timeout_s} s"


def _digest(terms: Terms) -> bytes:
    return hashlib.sha256(str(terms.channel).encode()).digest()


def _proof(terms: Terms, side: str) -> bytes:
    """RFC 2104, so that the token itself never travels."""
    return hmac.digest(terms.token.encode(), f"{side} of {terms.channel}".encode(), "sha256")

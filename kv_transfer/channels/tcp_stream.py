"""A connected socket whose calls end at a deadline, when the peer hangs up, or when another thread aborts it.

Bytes leave from and arrive in many places at once, `Runs`, so that nothing is staged.
"""

import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from core.errors import TransferFailed

_LOOK_S = 0.05  # between looks at the abort flag: while connecting nobody can shut the socket down
_PIECE_BYTES = 2**20  # per system call: what one side has just copied is still in the cache for the other
_WAKE_BYTES = 2**18  # what a receiver waits for before it runs again
_LOCAL_BUFFER_BYTES = 5 * 2**17  # of a sending socket, doubled by Linux: room for a short slab
_MAX_BUFFERS = 1024  # IOV_MAX of Linux


class Runs:
    """Runs of bytes, consumed from the front."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        """None of the views is empty."""
        self._views = list(views)
        self._first = 0
        self.num_bytes = sum(map(len, views))

    def ahead(self) -> list[memoryview]:
        """The next runs, as many as one system call should take."""
        run_bytes = max(len(view) for view in self._views[self._first : self._first + 2])
        num = min(_MAX_BUFFERS, 1 + _PIECE_BYTES // run_bytes)
        return self._views[self._first : self._first + num]

    def consume(self, num_bytes: int) -> None:
        """Drops the first bytes."""
        self.num_bytes -= num_bytes
        while num_bytes:
            view = self._views[self._first]
            if num_bytes < len(view):
                self._views[self._first] = view[num_bytes:]
                return
            num_bytes -= len(view)
            self._first += 1


class Stream:
    """Made in the thread that uses it; only `abort` comes from others too."""

    def __init__(self, connection: socket.socket, aborted: threading.Event) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._aborted = aborted
        self._owner = threading.get_ident()
        self._readable = _poll_for(connection, select.POLLIN)
        self._writable = _poll_for(connection, select.POLLOUT)
        self._least = 1

    def send(self, runs: Runs, deadline: float) -> None:
        """Returns when the runs may change. Raises TransferFailed or OSError."""
        while runs.num_bytes:
            _wait(self._writable, deadline, self._aborted)
            self.send_some(runs)

    def send_some(self, runs: Runs) -> None:
        """Sends what there is room for, without waiting. Raises OSError."""
        with suppress(BlockingIOError):
            runs.consume(self._socket.sendmsg(runs.ahead()))

    def receive_some(self, views: list[memoryview]) -> int:
        """Fills what has arrived already, without waiting; returns the bytes. Raises TransferFailed or OSError."""
        try:
            num_bytes = self._socket.recvmsg_into(views)[0]
        except BlockingIOError:
            return 0
        if not num_bytes:
            raise TransferFailed("aborted" if self._aborted.is_set() else "the peer hung up")
        return num_bytes

    def receive(self, num_bytes: int, deadline: float) -> bytes:
        """Exactly so many bytes. Raises TransferFailed or OSError."""
        received = bytearray(num_bytes)
        runs = Runs([memoryview(received)])
        while runs.num_bytes:
            if received_now := self.receive_some(runs.ahead()):
                runs.consume(received_now)
            else:
                self.wait_readable(runs.num_bytes, deadline)
        return bytes(received)

    def require_peer(self) -> None:
        """Raises TransferFailed or OSError when the peer has hung up; it must not have sent anything."""
        with suppress(BlockingIOError):
            self._socket.recv(1, socket.MSG_PEEK)
            raise TransferFailed("the peer hung up")

    def wait_readable(self, num_bytes: int, deadline: float) -> None:
        """Until a good part of so many bytes has come, or the peer hung up. Raises TransferFailed at the deadline."""
        least = min(num_bytes, _WAKE_BYTES)
        if least != self._least:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least
        _wait(self._readable, deadline, self._aborted)

    def abort(self) -> None:
        """See Abortable. The lane's last call comes from its own thread and frees the socket."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.get_ident() == self._owner:
            self._socket.close()


def connect(host: str, port: int, deadline: float, aborted: threading.Event) -> Stream:
    """Raises OSError when nobody listens there, TransferFailed at the deadline or an abort."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        with suppress(BlockingIOError):
            connection.connect(address)
        _wait(_poll_for(connection, select.POLLOUT), deadline, aborted)
        if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, f"cannot connect to {host}:{port}")
        return Stream(connection, aborted)
    except BaseException:
        connection.close()
        raise


def suit_one_host(connection: socket.socket) -> None:
    """For a sender whose receiver is on the same host.

    There is no congestion to control, and BBR's pacing costs a third of the throughput. Bytes wait in the socket no
    longer than the receiver needs to wake: a few hundred KiB stay in the caches of both ends, MiBs do not.
    """
    if sys.platform == "linux" and connection.getpeername()[0] == connection.getsockname()[0]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER_BYTES)
        with suppress(OSError):  # a kernel without it
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def _poll_for(connection: socket.socket, events: int) -> select.poll:
    poll = select.poll()
    poll.register(connection, events)
    return poll


def _wait(poll: select.poll, deadline: float, aborted: threading.Event) -> None:
    """Until the socket is ready, in error or shut down. Raises TransferFailed at the deadline or an abort."""
    while True:
        remaining = deadline - time.monotonic()
        if aborted.is_set():
            raise TransferFailed("aborted")
        if remaining <= 0:
            raise TransferFailed("the deadline passed")
        if poll.poll(1 + min(_LOOK_S, remaining) * 1000):
            return

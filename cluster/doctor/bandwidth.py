"""Bytes per second of one TCP connection between two hosts, within bounds of bytes and time."""

import socket
import threading
import time

MAX_BYTES = 64 << 20
MAX_S = 2.0
_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 5.0  # to connect, and between pieces


class Sink:
    """Takes one connection, reads it to its end and confirms, in a thread of its own."""

    def __init__(self, host: str) -> None:
        self._server = socket.create_server((host, 0))
        self._server.settimeout(_TIMEOUT_S)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    def _serve(self) -> None:
        with self._server:
            try:
                connection, _ = self._server.accept()
                with connection:
                    connection.settimeout(_TIMEOUT_S)
                    buffer = bytearray(_PIECE_BYTES)
                    while connection.recv_into(buffer):
                        pass
                    connection.sendall(b".")
            except OSError:
                return  # the sender sees it and reports


def measure(host: str, port: int, max_bytes: int = MAX_BYTES, max_s: float = MAX_S) -> float:
    """Sends zeros to a Sink until a bound; bytes per second, the confirmation's way back included. Raises OSError."""
    piece, sent = bytes(_PIECE_BYTES), 0
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as connection:
        started = time.monotonic()
        while sent < max_bytes and time.monotonic() - started < max_s:
            connection.sendall(piece)
            sent += len(piece)
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != b".":
            raise OSError("the receiver ended early")
        return sent / (time.monotonic() - started)

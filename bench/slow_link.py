"""A wire of a given speed in front of any transport: it stands for a network, and costs no core anything.

Each receiving end has one wire; a slab keeps it for latency + bytes / speed, from its grant on or from when the slab
before it has passed. Then the transport under it moves the bytes, while the wire takes the next slab:

    grant 0, 1, 2 ...    wire |  slab 0  |  slab 1  |  slab 2  |       by sleeping
                         transport       | slab 0   | slab 1   | ...   computes
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from torch import Tensor

from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.protocol import Connector, Landing, Passage, ReceiverEnd, SenderEnd, Terms
from kv_transfer.spans import span_bytes


@dataclass(frozen=True)
class Speed:
    """Of one wire."""

    bytes_per_s: float
    latency_s: float  # of each slab

    def seconds(self, num_bytes: int) -> float:
        """How long one slab keeps the wire."""
        return self.latency_s + num_bytes / self.bytes_per_s


def speed_in(path: Path) -> Callable[[], Speed]:
    """Reads a file that `write_speed` wrote, so that a benchmark changes the wires of ranks that run."""

    def read() -> Speed:
        bytes_per_s, latency_s = path.read_text().split()
        return Speed(float(bytes_per_s), float(latency_s))

    return read


def write_speed(path: Path, speed: Speed) -> None:
    """Whoever reads meanwhile sees the old speed or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{speed.bytes_per_s} {speed.latency_s}")
    fresh.replace(path)


class SlowReceiver:
    """The end that asks, behind a wire."""

    def __init__(self, inner: ReceiverEnd, pool: Tensor, speed: Callable[[], Speed]) -> None:
        self._inner = inner
        self._pool = pool
        self._speed = speed
        self._free_at = 0.0  # when the wire has passed what it was granted so far
        self._aborted = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wire")

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._inner.is_open

    def fetch(self, header: SlabHeader, destination: Span, landing: Landing, timeout_s: float) -> "Future[Passage]":
        """See ReceiverEnd."""
        outer: Future[Passage] = Future()
        outer.set_running_or_notify_cancel()
        granted_at = time.monotonic()
        num_bytes = span_bytes(self._pool, destination)

        def pass_through() -> None:
            begun_at = max(self._free_at, granted_at)
            passed_at = self._free_at = begun_at + self._speed().seconds(num_bytes)
            if self._aborted.wait(passed_at - time.monotonic()):
                outer.set_exception(TransferFailed("the wire was cut"))
                return
            inner = self._inner.fetch(header, destination, landing, timeout_s)
            inner.add_done_callback(lambda done: _hand_on(done, outer, begun_at, passed_at))

        self._thread.submit(pass_through)
        return outer

    def abort(self, reason: str) -> None:
        """See ReceiverEnd."""
        self._aborted.set()
        self._thread.shutdown(wait=True)
        self._inner.abort(reason)


class SlowConnector:
    """Makes ends of another connector and puts a wire before the receiving ones."""

    def __init__(self, inner: Connector, pool: Tensor, speed: Callable[[], Speed]) -> None:
        self._inner = inner
        self._pool = pool
        self._speed = speed
        self.kind, self.reach, self.rendezvous = inner.kind, inner.reach, inner.rendezvous

    def sender_end(self, terms: Terms) -> SenderEnd:
        """See Connector."""
        return self._inner.sender_end(terms)

    def receiver_end(self, terms: Terms, rendezvous: str) -> SlowReceiver:
        """See Connector."""
        return SlowReceiver(self._inner.receiver_end(terms, rendezvous), self._pool, self._speed)

    def close(self) -> None:
        """See Connector."""
        self._inner.close()


def _hand_on(done: "Future[Passage]", outer: "Future[Passage]", begun_at: float, passed_at: float) -> None:
    """What the transport did after the wire counts as scattering."""
    error = done.exception()
    if error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(replace(done.result(), begun_at=begun_at, turned_at=passed_at))

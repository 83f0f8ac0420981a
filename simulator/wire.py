"""Control messages between the fleet's processes: delivered after a constant time, in order, unless a process is gone.

A call that a process refuses, or that nobody is there to take, fails at its sender one message time later.
"""

from collections.abc import Callable
from typing import Any, Protocol

from core.errors import BatonError, PeerLost
from simulator.events import MESSAGE, EventQueue

Failed = Callable[[BatonError], None]


class Process(Protocol):
    """Somebody who is spoken to."""

    number: int  # of all processes
    alive: bool


def _nobody(error: BatonError) -> None:
    del error


class Wire:
    """All messages take `latency_s`."""

    def __init__(self, queue: EventQueue, latency_s: float) -> None:
        self._queue = queue
        self.latency_s = latency_s

    def tell(self, sender: int, to: Process, handle: Callable[..., None], *args: Any, failed: Failed = _nobody) -> None:
        """Calls `handle(*args)` at the receiver, which may raise a BatonError."""
        self._queue.at(self._queue.now + self.latency_s, MESSAGE, sender, self._arrive, to, handle, args, failed)

    def _arrive(self, to: Process, handle: Callable[..., None], args: tuple[Any, ...], failed: Failed) -> None:
        if not to.alive:
            self.fail(to, failed, PeerLost("connection refused"))
            return
        try:
            handle(*args)
        except BatonError as error:
            self.fail(to, failed, error)

    def fail(self, at: Process, failed: Failed, error: BatonError) -> None:
        """The caller hears of an error."""
        if failed is not _nobody:
            self._queue.at(self._queue.now + self.latency_s, MESSAGE, at.number, failed, error)

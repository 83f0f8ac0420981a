"""One thread that opens a connection, then serves jobs in order; after the first failure it serves none."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from core.errors import TransferFailed
from kv_transfer.channels.protocol import Passage

log = logging.getLogger(__name__)


class Abortable(Protocol):
    """What a lane owns: a connection whose blocked calls another thread can end."""

    def abort(self) -> None:
        """Ends the connection: a blocked or later call raises soon. Idempotent, from any thread."""
        ...


WireT = TypeVar("WireT", bound=Abortable)
Job = Callable[[WireT, float], Passage]  # (connection, deadline on the monotonic clock)


class Lane(Generic[WireT]):
    """Serves jobs one after another on a connection of its own."""

    def __init__(self, name: str, open_wire: Callable[[threading.Event], WireT]) -> None:
        """`open_wire` may block; it raises soon after the event is set."""
        self._name = name
        self._open_wire = open_wire
        self._changed = threading.Condition()
        self._aborted = threading.Event()
        self._jobs: deque[tuple[Job[WireT], float, Future[Passage]]] = deque()
        self._wire: WireT | None = None
        self._failure: TransferFailed | None = None
        self._thread = threading.Thread(target=self._run, name=f"channel {name}", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._failure is None

    def submit(self, job: Job[WireT], timeout_s: float) -> "Future[Passage]":
        """Queues a job; its future fails with TransferFailed when the lane ends first."""
        future: Future[Passage] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._failure is not None:
                future.set_exception(self._failure)
            else:
                self._jobs.append((job, time.monotonic() + timeout_s, future))
                self._changed.notify()
        return future

    def abort(self, reason: str) -> None:
        """Ends the lane; returns when its thread is over."""
        self._fail(TransferFailed(f"channel {self._name}: {reason}"))
        self._thread.join()

    def _run(self) -> None:
        """Thread boundary: whatever goes wrong ends the lane and is told to everyone who waits on it."""
        try:
            wire = self._open_wire(self._aborted)
            with self._changed:
                self._wire = wire
            while (entry := self._next_job()) is not None:
                self._serve(entry, wire)
        except Exception as error:
            log.debug("channel %s ended", self._name, exc_info=error)
            self._fail(TransferFailed(f"channel {self._name}: {error}"))
        finally:
            self._end()

    def _next_job(self) -> tuple[Job[WireT], float, "Future[Passage]"] | None:
        with self._changed:
            while self._failure is None and not self._jobs:
                self._changed.wait()
            return self._jobs.popleft() if self._failure is None else None

    def _serve(self, entry: tuple[Job[WireT], float, "Future[Passage]"], wire: WireT) -> None:
        job, deadline, future = entry
        try:
            passage = job(wire, deadline)
        except BaseException:
            with self._changed:
                self._jobs.appendleft(entry)  # fails with the others, once the cause is recorded
            raise
        future.set_result(passage)

    def _fail(self, failure: TransferFailed) -> None:
        """The one door to the failed state; the first cause stays."""
        with self._changed:
            if self._failure is None:
                self._failure = failure
            self._changed.notify()
            wire = self._wire
        self._aborted.set()
        if wire is not None:
            wire.abort()

    def _end(self) -> None:
        with self._changed:
            wire, self._wire = self._wire, None
            jobs, self._jobs = list(self._jobs), deque()
        if wire is not None:
            wire.abort()
        assert self._failure is not None
        for _, _, future in jobs:
            future.set_exception(self._failure)

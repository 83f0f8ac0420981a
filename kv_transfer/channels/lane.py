"""One thread that opens a connection, then serves jobs in order; after the first failure it serves none.

A job may come in two parts, so that the next one starts while the first is on its way; see Job.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
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
Finish = Callable[[], Passage]
Job = Callable[
    [WireT, float], Passage | Finish
]  # (connection, deadline on the monotonic clock): does all, or starts it


@dataclass(eq=False)
class _Entry(Generic[WireT]):
    job: Job[WireT]
    deadline: float
    future: "Future[Passage]"
    finish: Finish | None = None


class Lane(Generic[WireT]):
    """Serves jobs one after another on a connection of its own."""

    def __init__(self, name: str, open_wire: Callable[[threading.Event], WireT], depth: int = 1) -> None:
        """`open_wire` may block; it raises soon after the event is set. `depth`: jobs that are started at a time."""
        self._name = name
        self._depth = depth
        self._open_wire = open_wire
        self._changed = threading.Condition()
        self._aborted = threading.Event()
        self._jobs: deque[_Entry[WireT]] = deque()
        self._taken: deque[_Entry[WireT]] = deque()  # by the thread, and not over; oldest first
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
                self._jobs.append(_Entry(job, time.monotonic() + timeout_s, future))
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
            while self._advance(wire):
                pass
        except Exception as error:
            log.debug("channel %s ended", self._name, exc_info=error)
            self._fail(TransferFailed(f"channel {self._name}: {error}"))
        finally:
            self._end()

    def _advance(self, wire: WireT) -> bool:
        """Starts the next job, or finishes the oldest when none waits or enough are started; False at the end."""
        entry = self._next_job() if len(self._taken) < self._depth else None
        if entry is not None:
            outcome = entry.job(wire, entry.deadline)
            if isinstance(outcome, Passage):
                self._taken.pop().future.set_result(outcome)
            else:
                entry.finish = outcome
            return True
        if not self._taken:
            return False
        finish = self._taken[0].finish
        assert finish is not None
        passage = finish()
        self._taken.popleft().future.set_result(passage)
        return True

    def _next_job(self) -> _Entry[WireT] | None:
        """Waits for one only while nothing is started; None when the lane has failed, too."""
        with self._changed:
            while self._failure is None and not self._jobs and not self._taken:
                self._changed.wait()
            if self._failure is not None or not self._jobs:
                return None
            self._taken.append(self._jobs.popleft())
            return self._taken[-1]

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
        """Nothing that was started outlives the lane: its buffers may be freed when this returns."""
        with self._changed:
            wire, self._wire = self._wire, None
            jobs, self._jobs = list(self._jobs), deque()
        if wire is not None:
            wire.abort()
        taken, self._taken = self._taken, deque()  # what they hold of the connection goes with them
        for entry in taken:
            if entry.finish is not None:
                with suppress(RuntimeError, TransferFailed):
                    entry.finish()
        assert self._failure is not None
        futures = [entry.future for entry in (*taken, *jobs)]
        for future in futures:
            future.set_exception(self._failure)

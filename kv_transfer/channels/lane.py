"""One thread that opens a connection, then serves jobs in order; after the first failure it serves none.

A job may come in two parts, so that the next one starts while the first is on its way; see Job. A short one that finds
the lane at rest is started by who submits it: waking a thread takes longer than to copy a small slab.
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
from kv_transfer.channels.borrowed_time import BorrowedTime
from kv_transfer.channels.protocol import Passage

log = logging.getLogger(__name__)

SHORT_BYTES = 2**20  # moved in 50 to 300 us, which is what it takes to wake a thread and to be woken by it
_CALLERS_SHARE, _CALLERS_MOST_S = 0.25, 2e-3  # of an event loop's time; the rest is for those whom it serves


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
        self._taken: deque[_Entry[WireT]] = deque()  # started, and not over; oldest first
        self._wire: WireT | None = None
        self._failure: TransferFailed | None = None
        self._callers_time = BorrowedTime(_CALLERS_SHARE, _CALLERS_MOST_S)
        self._thread = threading.Thread(target=self._run, name=f"channel {name}", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """False after the first failure or an abort."""
        return self._failure is None

    def submit(self, job: Job[WireT], timeout_s: float, *, is_short: bool = False) -> "Future[Passage]":
        """Queues a job; its future fails with TransferFailed when the lane ends first.

        `is_short`: starting the job never blocks, so the calling thread may do it.
        """
        now = time.monotonic()
        entry = _Entry(job, now + timeout_s, Future())
        entry.future.set_running_or_notify_cancel()
        with self._changed:
            if self._failure is not None:
                entry.future.set_exception(self._failure)
            elif is_short and self._is_idle and self._wire is not None and self._callers_time.is_left(now):
                self._start_here(self._wire, entry)
                self._callers_time.spend(now, time.monotonic())
            else:
                self._jobs.append(entry)
                self._changed.notify()
        return entry.future

    @property
    def _is_idle(self) -> bool:
        return not self._jobs and not self._taken

    def _start_here(self, wire: WireT, entry: _Entry[WireT]) -> None:
        """In the thread of `submit`, while it holds the lock: nothing else starts, and nobody ends the lane meanwhile.

        What is left to be finished, or to be failed, is the lane's thread's.
        """
        self._taken.append(entry)
        try:
            self._start(wire, entry)
        except Exception as error:  # as in `_run`
            self._fail(self._failed_by(error))
        if self._taken:
            self._changed.notify()

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
            self._fail(self._failed_by(error))
        finally:
            self._end()

    def _advance(self, wire: WireT) -> bool:
        """Starts the next job, or finishes the oldest when none waits or enough are started; False at the end."""
        entry = self._next_entry()
        if entry is None:
            return False
        if entry.finish is None:
            self._start(wire, entry)
        else:
            passage = entry.finish()
            self._taken.popleft()
            entry.future.set_result(passage)
        return True

    def _start(self, wire: WireT, entry: _Entry[WireT]) -> None:
        """The entry is the last that was taken."""
        outcome = entry.job(wire, entry.deadline)
        if isinstance(outcome, Passage):
            self._taken.pop()
            entry.future.set_result(outcome)
        else:
            entry.finish = outcome

    def _next_entry(self) -> _Entry[WireT] | None:
        """Waits for one to start, or to finish; None when the lane has failed."""
        with self._changed:
            while self._failure is None and self._is_idle:
                self._changed.wait()
            if self._failure is not None:
                return None
            if not self._jobs or len(self._taken) == self._depth:
                return self._taken[0]
            self._taken.append(self._jobs.popleft())
            return self._taken[-1]

    def _failed_by(self, error: Exception) -> TransferFailed:
        log.debug("channel %s ended", self._name, exc_info=error)
        return TransferFailed(f"channel {self._name}: {error}")

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
                with suppress(OSError, RuntimeError, TransferFailed):
                    entry.finish()
        assert self._failure is not None
        futures = [entry.future for entry in (*taken, *jobs)]
        for future in futures:
            future.set_exception(self._failure)

"""An in-process line with NCCL's rules, so that code above a channel is proven against them without a GPU.

Operations have no tags: the n-th of one end meets the n-th of the other, whatever they are. Both block until they
meet. Two sends, or two receives, that meet hang until a deadline. Unequal sizes corrupt the receiver's slab and hang.
An abort or a missed deadline leaves garbage in the slab and ends the connection for both.
"""

import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from core.errors import TransferFailed
from kv_transfer.channels.two_sided import Posted, Wire

_GARBAGE = 0xA5


@dataclass(eq=False)
class _Operation:
    is_send: bool
    slab: Tensor
    is_done: bool = False


@dataclass
class StrictLine:
    """Pending operations of both ends, matched by order alone."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    pending: tuple[deque[_Operation], deque[_Operation]] = field(default_factory=lambda: (deque(), deque()))
    is_aborted: bool = False

    def wire(self, rank: int) -> Wire:
        """The wire of rank 0 or 1."""
        return _StrictWire(self, rank)

    def post(self, rank: int, operation: _Operation) -> None:
        """Queues an operation and lets the heads of both queues meet. Called with `changed` held."""
        self.pending[rank].append(operation)
        ours, theirs = self.pending
        if not (ours and theirs) or ours[0].is_send == theirs[0].is_send:
            return
        sent, received = (ours[0], theirs[0]) if ours[0].is_send else (theirs[0], ours[0])
        if sent.slab.numel() != received.slab.numel():
            received.slab.fill_(_GARBAGE)
            return
        received.slab.copy_(sent.slab)
        sent.is_done = received.is_done = True
        ours.popleft()
        theirs.popleft()
        self.changed.notify_all()


class _StrictWire:
    def __init__(self, line: StrictLine, rank: int) -> None:
        self._line = line
        self._rank = rank

    def start_send(self, slab: Tensor) -> Posted:
        return self._start(_Operation(True, slab))

    def start_receive(self, slab: Tensor) -> Posted:
        return self._start(_Operation(False, slab))

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def abort(self) -> None:
        with self._line.changed:
            self._line.is_aborted = True
            self._line.changed.notify_all()

    def _start(self, operation: _Operation) -> Posted:
        with self._line.changed:
            if not self._line.is_aborted:
                self._line.post(self._rank, operation)
        return _Pending(self._line, operation)


@dataclass(frozen=True)
class _Pending:
    line: StrictLine
    operation: _Operation

    def wait(self, deadline: float) -> None:
        line, operation = self.line, self.operation
        with line.changed:
            line.changed.wait_for(lambda: operation.is_done or line.is_aborted, deadline - time.monotonic())
            if operation.is_done:
                return
            was_aborted = line.is_aborted
            line.is_aborted = True
            line.changed.notify_all()
            if not operation.is_send:
                operation.slab.fill_(_GARBAGE)
        raise TransferFailed("aborted" if was_aborted else "nothing matched before the deadline")

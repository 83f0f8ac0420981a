"""The links between the stages of a replica: pairs of ranks over Gloo, activations over NCCL on CUDA.

One pair carries orders, one activations (the same on CPU would mix their order), one what a stage reports.
"""

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from core.errors import PeerLost
from core.kv_layout import KVLayout
from engine.int_frames import from_frames, new_frame, room_for_rest, to_frames
from engine.rank_store import Group, RankStore

_TAG = 0
_MOST_NOTICES = 16  # orders and reports on their way; of activations, as many as there may be steps in flight


class _Link:
    """One direction of a pair of ranks. Gloo's sends are over when the receiver has taken them, so that the last ones
    are kept, with what they send, for a while.
    """

    def __init__(self, group: Group, *, sends: bool, most_pending: int) -> None:
        self._group = group
        self._peer = 1 if sends else 0
        self._most_pending = most_pending
        self._pending: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Waits for the oldest send only when too many are under way."""
        while len(self._pending) > self._most_pending or (self._pending and self._pending[0][0].is_completed()):
            self._settle()
        self._pending.append((_told(lambda: self._group.send([tensor], self._peer, _TAG)), tensor))

    def flush(self) -> None:
        """Returns when everything was taken."""
        while self._pending:
            self._settle()

    def receive(self, tensor: Tensor, timeout_s: float | None = None) -> None:
        """Gloo waits for the tensor, NCCL only orders the present stream after it."""
        work = _told(lambda: self._group.recv([tensor], self._peer, _TAG))
        _told(work.wait if timeout_s is None else lambda: work.wait(timedelta(seconds=timeout_s)))

    def close(self) -> None:
        self._group.shutdown()

    def _settle(self) -> None:
        work, _ = self._pending.popleft()
        _told(work.wait)


class StageLinks:
    """A Pipeline of several processes. After a PeerLost it is of no more use."""

    def __init__(self, store: RankStore, rank: int, layout: KVLayout, device: torch.device, timeout_s: float) -> None:
        """Raises RuntimeError when a neighbour does not come.

        What a stage waits for has passed all those before it, each of which may take `timeout_s`.
        """
        self.num_stages = layout.pipeline_parallel
        self.stage = layout.stage_of(rank)
        part = layout.part_of(rank)
        patience_s = timeout_s * self.num_stages

        def pair(name: str, *, sends: bool) -> _Link:
            return _Link(store.gloo(name, 0 if sends else 1, 2, patience_s), sends=sends, most_pending=_MOST_NOTICES)

        def neighbours(stage: int, *, sends: bool) -> tuple[_Link, _Link]:
            name, ours = f"stage{stage}/part{part}", 0 if sends else 1
            orders, data = pair(f"{name}/orders", sends=sends), f"{name}/activations"
            on_device = device.type == "cuda"
            group = store.nccl(data, ours, 2, device) if on_device else store.gloo(data, ours, 2, patience_s)
            return orders, _Link(group, sends=sends, most_pending=self.num_stages)

        self._before = neighbours(self.stage, sends=False) if self.stage > 0 else None
        self._next = neighbours(self.stage + 1, sends=True) if self.stage + 1 < self.num_stages else None
        self._reports: dict[int, _Link] = {}  # by the stage that reports
        if part == 0:
            reporting = range(1, self.num_stages) if self.stage == 0 else [self.stage]
            self._reports = {stage: pair(f"stage{stage}/reports", sends=self.stage > 0) for stage in reporting}

    def pass_on(self, orders: list[int], *, wait: bool = False) -> None:
        """See Pipeline."""
        if self._next is not None:
            link, _ = self._next
            for frame in to_frames(orders):
                link.send(frame)
            if wait:
                link.flush()

    def orders(self, timeout_s: float | None = None) -> list[int]:
        """See Pipeline."""
        assert self._before is not None
        link, _ = self._before
        frame = new_frame()
        link.receive(frame, timeout_s)
        rest = room_for_rest(frame)
        if rest is not None:
            link.receive(rest)
        return from_frames(frame, rest)

    def send(self, hidden: Tensor) -> None:
        """See Pipeline."""
        assert self._next is not None
        self._next[1].send(hidden)

    def receive(self, hidden: Tensor) -> None:
        """See Pipeline."""
        assert self._before is not None
        self._before[1].receive(hidden)

    def report(self, tensors: Sequence[Tensor]) -> None:
        """See Pipeline."""
        for tensor in tensors:
            self._reports[self.stage].send(tensor)

    def reported(self, stage: int, tensors: Sequence[Tensor]) -> None:
        """See Pipeline."""
        for tensor in tensors:
            self._reports[stage].receive(tensor)

    def close(self) -> None:
        """See Pipeline."""
        for link in (*(self._before or ()), *(self._next or ()), *self._reports.values()):
            link.close()


def _told(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:
        raise PeerLost(f"a neighbouring stage is lost: {error}") from error

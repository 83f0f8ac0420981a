"""The ranks of one stage: collectives over Gloo (CPU) or NCCL (CUDA), without a default world.

control  Gloo, always: the first rank broadcasts what to compute as 64-bit integers
data     the control group itself on CPU, NCCL on CUDA: sums of activations, gathered logits
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from core.errors import PeerLost
from engine.int_frames import from_frames, new_frame, room_for_rest, to_frames
from engine.rank_store import RankStore

dist: Any = torch_distributed


class TensorParallelGroup:
    """A RankGroup of several processes. After a PeerLost it is of no more use."""

    def __init__(self, store: RankStore, name: str, rank: int, size: int, device: torch.device) -> None:
        """`rank` of `size` within the stage, whose `name` differs from those of other stages. Raises RuntimeError."""
        self.rank = rank
        self.size = size
        self._control = store.gloo(f"{name}/control", rank, size)
        self._data = self._control if device.type == "cpu" else store.nccl(f"{name}/data", rank, size, device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See RankGroup."""
        self._wait(lambda: self._data.allreduce([tensor]))
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """See RankGroup."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: self._data.allgather([parts], [tensor]))
        return torch.cat(parts, dim=-1) if self.rank == 0 else None

    def broadcast(self, values: list[int] | None, timeout_s: float | None = None) -> list[int]:
        """See RankGroup. Long lists take a second message."""
        if values is not None:
            for frame in to_frames(values):
                self._broadcast(frame, None)
            return values
        frame = new_frame()
        self._broadcast(frame, timeout_s)
        rest = room_for_rest(frame)
        if rest is not None:
            self._broadcast(rest, None)
        return from_frames(frame, rest)

    def close(self) -> None:
        """Leaves the group; the others' next collective raises PeerLost."""
        for group in {id(group): group for group in (self._data, self._control)}.values():
            group.shutdown()

    def _broadcast(self, tensor: Tensor, timeout_s: float | None) -> None:
        options = dist.BroadcastOptions()
        if timeout_s is not None:
            options.timeout = timedelta(seconds=timeout_s)
        options.rootRank = 0
        self._wait(lambda: self._control.broadcast([tensor], options))

    def _wait(self, start: Callable[[], Any]) -> None:
        """Gloo waits for the result, NCCL only orders the present stream after it."""
        try:
            start().wait()
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} of {self.size} lost another rank: {error}") from error

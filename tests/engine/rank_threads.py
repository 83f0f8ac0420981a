"""Ranks of one replica as threads of this process: every split of a model without processes and sockets."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from core.kv_layout import KVLayout
from engine.backend import Backend, torch_backend
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.runner import ModelRunner
from tests.engine.plain_engine import BLOCK_SIZE, CPU

TIMEOUT_S = 60.0


class _Meeting:
    """Where ranks lay down what the others need; a rank that fails wakes the others with BrokenBarrierError."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.laid: list[object] = [None] * size

    def exchange(self, rank: int, value: object) -> list[object]:
        self.laid[rank] = value
        self.barrier.wait()
        seen = list(self.laid)
        self.barrier.wait()
        return seen


class ThreadRank:
    """A RankGroup."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._meeting = meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self.rank, tensor.clone())).sum(dim=0)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        parts = self._meeting.exchange(self.rank, tensor)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None

    def broadcast(self, values: list[int] | None, timeout_s: float | None = None) -> list[int]:
        return self._meeting.exchange(self.rank, values)[0]

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def rank_threads(
    checkpoint: Path,
    size: int,
    *,
    whole_experts: bool = False,
    dtype: str | None = None,
    make_backend: Callable[[KVLayout], Backend] = torch_backend,
) -> Iterator[ModelRunner]:
    """The first rank's runner; the others follow it until the end."""
    spec, meeting = load_model_spec(checkpoint, dtype), _Meeting(size)
    layout, runners, failures = spec.kv_layout(size, BLOCK_SIZE), {}, []
    ready = threading.Barrier(size, timeout=TIMEOUT_S)

    def make(rank: int) -> ModelRunner:
        group = ThreadRank(meeting, rank, size)
        read = CheckpointReader(checkpoint, spec, CPU).read
        return ModelRunner(spec, read, layout, 512, group, CPU, 1, whole_experts, make_backend(layout))

    def follow(rank: int) -> None:
        try:
            runner = make(rank)
            ready.wait()
            for batch in runner.launches():
                runner.execute_launched(batch)
        except Exception as error:
            failures.append(error)
            meeting.barrier.abort()
            ready.abort()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    try:
        runners[0] = make(0)
        ready.wait()
        yield runners[0]
        runners[0].close()
    finally:
        if 0 not in runners or failures:
            meeting.barrier.abort()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not failures, failures

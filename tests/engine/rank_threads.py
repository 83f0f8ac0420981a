"""Ranks of one replica as threads of this process: every split of a model without processes and sockets."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from core.kv_layout import KVLayout
from engine.backend import Backend, torch_backend
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.pipeline import SingleStage
from engine.rank_group import SingleRank
from engine.rank_links import RankLinks
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


class ThreadStage:
    """A Pipeline: mailboxes between the ranks of one process."""

    def __init__(self, boxes: dict[object, queue.Queue], layout: KVLayout, rank: int) -> None:
        self.stage, self.num_stages = layout.stage_of(rank), layout.pipeline_parallel
        self._part = layout.part_of(rank)
        self._boxes = boxes

    def _box(self, kind: str, stage: int) -> queue.Queue:
        return self._boxes[kind, stage, 0 if kind == "reports" else self._part]

    def pass_on(self, orders: list[int], *, wait: bool = False) -> None:
        if self.stage + 1 < self.num_stages:
            self._box("orders", self.stage + 1).put(list(orders))

    def orders(self, timeout_s: float | None = None) -> list[int]:
        return self._box("orders", self.stage).get(timeout=TIMEOUT_S)

    def send(self, hidden: Tensor) -> None:
        self._box("activations", self.stage + 1).put(hidden.clone())

    def receive(self, hidden: Tensor) -> None:
        came = self._box("activations", self.stage).get(timeout=TIMEOUT_S)
        assert (came.shape, came.dtype) == (hidden.shape, hidden.dtype)
        hidden.copy_(came)

    def report(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._box("reports", self.stage).put(tensor.clone())

    def reported(self, stage: int, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            came = self._box("reports", stage).get(timeout=TIMEOUT_S)
            assert (came.shape, came.dtype) == (tensor.shape, tensor.dtype)
            tensor.copy_(came)

    def close(self) -> None:
        """Nothing is held."""


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
    stages: int = 1,
    whole_experts: bool = False,
    dtype: str | None = None,
    make_backend: Callable[[KVLayout], Backend] = torch_backend,
) -> Iterator[ModelRunner]:
    """The first rank's runner, of `stages` times `size`; the others follow it until the end."""
    spec, meetings = load_model_spec(checkpoint, dtype), [_Meeting(size) for _ in range(stages)]
    layout, runners, failures = spec.kv_layout(size, BLOCK_SIZE, stages), {}, []
    ready = threading.Barrier(layout.num_ranks, timeout=TIMEOUT_S)
    keys = product(("orders", "activations", "reports"), range(stages), range(size))
    boxes: dict[object, queue.Queue] = {key: queue.Queue() for key in keys}

    def make(rank: int) -> ModelRunner:
        group = ThreadRank(meetings[layout.stage_of(rank)], layout.part_of(rank), size)
        pipeline = ThreadStage(boxes, layout, rank) if stages > 1 else SingleStage()
        links = RankLinks(group if size > 1 else SingleRank(), pipeline)
        read = CheckpointReader(checkpoint, spec, CPU).read
        return ModelRunner(spec, read, layout, 512, links, CPU, 1, whole_experts, make_backend(layout))

    def abort() -> None:
        for meeting in meetings:
            meeting.barrier.abort()

    def follow(rank: int) -> None:
        try:
            runner = make(rank)
            ready.wait()
            for batch in runner.launches():
                runner.execute_launched(batch)
        except Exception as error:
            failures.append(error)
            abort()
            ready.abort()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, layout.num_ranks)]
    for thread in threads:
        thread.start()
    try:
        runners[0] = make(0)
        ready.wait()
        yield runners[0]
        runners[0].close()
    finally:
        if 0 not in runners or failures:
            abort()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not failures, failures

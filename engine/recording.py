"""A computation that is recorded once over memory that stays where it is, and replayed without its launches' cost."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], Tensor | None]


class Recording(Protocol):
    """See Record."""

    def replay(self) -> Tensor | None:
        """Computes again over what the memory holds now; the result is good until any recording is replayed."""
        ...


Record = Callable[[Work], Recording]  # what is recorded is not computed, and was computed before


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory, since one is replayed at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Recording:
        """See Record. Other threads may go on using the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return _CudaRecording(graph, result)


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor | None) -> None:
        self._graph = graph
        self._result = result

    def replay(self) -> Tensor | None:
        self._graph.replay()
        return self._result

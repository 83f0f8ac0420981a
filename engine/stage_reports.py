"""What later stages tell the replica's first rank of each step: layer groups whose KV is written, its end, its tokens.

Both ends know from the step's orders what comes, so that a report is a notice of its kind and number, and tensors of
known shapes behind the last one.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from core.kv_layout import KVLayout
from engine.pipeline import Pipeline
from engine.sampler import Drawn, room_for_drawn
from engine.step_inputs import DrawAt

_WRITTEN, _ENDED = range(2)

OnLayers = Callable[[int, int], None]


class StageReports:
    """The first rank of a later stage speaks. A thread of its own waits for device and receiver."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reports")
        self._last: Future[None] | None = None

    def written(self, stop: int, event: torch.cuda.Event | None) -> None:
        """A layer group that ends before layer `stop`, once the event has come."""
        self._submit(event, _WRITTEN, stop, ())

    def ended(self, drawn: Sequence[Tensor], event: torch.cuda.Event | None) -> None:
        """The step, on the last stage; `drawn` as in Drawn.tensors, on the host once the event has come."""
        self._submit(event, _ENDED, len(drawn), [tensor.contiguous() for tensor in drawn if tensor.numel()])

    def close(self) -> None:
        """Waits for what was said last."""
        self._thread.shutdown(wait=True)

    def _submit(self, event: torch.cuda.Event | None, kind: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Raises PeerLost when an earlier report met nobody."""
        if self._last is not None and self._last.done():
            self._last.result()

        def work() -> None:
            if event is not None:
                event.synchronize()
            self._pipeline.report([torch.tensor([kind, number]), *tensors])

        self._last = self._thread.submit(work)


def await_reports(
    pipeline: Pipeline, layout: KVLayout, group_sizes: Mapping[int, int], on_layers: OnLayers | None
) -> None:
    """Until a step has ended on all later stages, telling of their layer groups, whose sizes are by the layer after
    each.
    """
    for stage in range(1, pipeline.num_stages):
        layers = layout.layers_of_stage(stage)
        for stop, size in group_sizes.items():
            if stop - 1 in layers:
                _await_notice(pipeline, stage, _WRITTEN, stop)
                assert on_layers is not None
                on_layers(stop - size, size)


def await_drawn(pipeline: Pipeline, draws: Sequence[DrawAt]) -> Drawn | None:
    """The end of the step, and what its last stage drew."""
    last = pipeline.num_stages - 1
    drawn = room_for_drawn(draws) if draws else None
    tensors = drawn.tensors() if drawn is not None else ()
    _await_notice(pipeline, last, _ENDED, len(tensors))
    pipeline.reported(last, [tensor for tensor in tensors if tensor.numel()])
    return drawn


def _await_notice(pipeline: Pipeline, stage: int, kind: int, number: int) -> None:
    notice = torch.empty(2, dtype=torch.int64)
    pipeline.reported(stage, [notice])
    assert notice.tolist() == [kind, number], f"stage {stage} reports {notice.tolist()}, not {[kind, number]}"

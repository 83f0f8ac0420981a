"""Decode steps of a few fixed sizes, each recorded when it first comes and replayed from then on.

    batch of 5       [ a b c d e ]
    step of size 8   [ x x x a b c d e ]       x: token 0 at position 0, written to a block that no sequence has

Ranks of a replica see the same batches, so that they record and replay alike. Shapes: R rows of a size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import AttentionBackend, AttentionStep, FixedAttentionStep
from engine.batch import BlockTable, SequenceStep, StepBatch
from engine.recording import Record, Recording, Work
from engine.step_inputs import StepInputs

LayOut = Callable[[StepBatch], StepInputs]
Compute = Callable[[Tensor, Tensor, AttentionStep], Tensor | None]  # (token ids, positions, attention) -> logits


@dataclass
class _Size:
    token_ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    attention: FixedAttentionStep
    recording: Recording | None = None


class DecodeGraphs:
    """Steps in which every sequence computes one token."""

    def __init__(
        self, sizes: Sequence[int], compute: Compute, attention: AttentionBackend, blocks_per_row: int, record: Record
    ) -> None:
        """`attention` must have steps of fixed size, of at most `blocks_per_row` blocks of a sequence."""
        self.sizes = tuple(sorted(sizes))
        self._compute = compute
        self._attention = attention
        self._blocks_per_row = blocks_per_row
        self._record = record
        self._made: dict[int, _Size] = {}

    def fits(self, batch: StepBatch) -> bool:
        """Whether `run` takes it."""
        sequences = batch.sequences
        return len(sequences) <= self.sizes[-1] and all(len(sequence.token_ids) == 1 for sequence in sequences)

    def run(self, batch: StepBatch, spare_block: int, lay_out: LayOut) -> tuple[StepInputs, Tensor | None]:
        """The step as it was laid out, and the logits of rows that draw; None where the decoder has none or none draws.

        `spare_block` takes what rows write that are there for the size alone.
        """
        rows = next(size for size in self.sizes if size >= len(batch.sequences))
        inputs = lay_out(_padded(batch, rows, spare_block))
        if rows not in self._made:
            self._made[rows] = self._make(rows, inputs.token_ids.device)
        size = self._made[rows]
        size.token_ids.copy_(inputs.token_ids)
        size.positions.copy_(inputs.positions)
        size.attention.renew(inputs)
        logits = self._first(size) if size.recording is None else size.recording.replay()
        drawn = None if logits is None or not inputs.draws else logits.index_select(0, inputs.draw_rows)
        return inputs, drawn

    def _first(self, size: _Size) -> Tensor | None:
        """Computed as it goes, since libraries set themselves up at first, then recorded."""
        work = self._work(size)
        logits = work()
        size.recording = self._record(work)
        return logits

    def _work(self, size: _Size) -> Work:
        return lambda: self._compute(size.token_ids, size.positions, size.attention)

    def _make(self, rows: int, device: torch.device) -> _Size:
        token_ids, positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        attention = self._attention.fixed(rows, self._blocks_per_row)
        assert attention is not None
        return _Size(token_ids, positions, attention)


def _padded(batch: StepBatch, rows: int, spare_block: int) -> StepBatch:
    tables = (BlockTable((spare_block,)),) * len(batch.sequences[0].block_tables)
    spare = SequenceStep((0,), 0, tables, None)
    return StepBatch(batch.sequences + (spare,) * (rows - len(batch.sequences)))

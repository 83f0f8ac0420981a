"""Lays a batch out as flat rows, one per token, single-token sequences first and shorter contexts before longer.

sequences   d1  d2  d3 | chunk a        | chunk b
rows        0   1   2  | 3 4 5 6 7 8 9  | 10 11 12
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Draw, SequenceStep, StepBatch


@dataclass(frozen=True)
class DrawAt:
    """One token to draw: for which sequence of the batch, how, and at which absolute position."""

    sequence: int
    draw: Draw
    position: int


@dataclass(frozen=True)
class StepInputs:
    """T rows, N of which draw. `sequences` is in row order; the first `num_single` of them have one row each."""

    sequences: tuple[SequenceStep, ...]
    num_single: int
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    draws: tuple[DrawAt, ...]
    draw_rows: Tensor  # [N] int64
    drawn: dict[int, int]  # rows whose token the step before draws: for which sequence of its batch


def lay_out(batch: StepBatch, device: torch.device) -> StepInputs:
    """Orders the batch and moves its integers to the device in two copies."""
    order = sorted(range(len(batch.sequences)), key=lambda i: _row_order(batch.sequences[i]))
    sequences = tuple(batch.sequences[index] for index in order)
    token_ids: list[int] = []
    positions: list[int] = []
    draws, draw_rows = [], []
    drawn: dict[int, int] = {}
    for index, sequence in zip(order, sequences, strict=True):
        end = sequence.first_position + len(sequence.token_ids)
        if sequence.drawn_by is not None:
            drawn[len(token_ids)] = sequence.drawn_by
        token_ids += sequence.token_ids
        positions += range(sequence.first_position, end)
        if sequence.draw is not None:
            draws.append(DrawAt(index, sequence.draw, end))
            draw_rows.append(len(token_ids) - 1)
    rows = int_tensor((token_ids, positions), device)
    return StepInputs(
        sequences=sequences,
        num_single=sum(1 for sequence in sequences if len(sequence.token_ids) == 1),
        token_ids=rows[0],
        positions=rows[1],
        draws=tuple(draws),
        draw_rows=int_tensor(draw_rows, device),
        drawn=drawn,
    )


def device_tensor(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tensor of nested lists, copied without waiting for the device."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def int_tensor(values: object, device: torch.device) -> Tensor:
    """`device_tensor` of int64."""
    return device_tensor(values, torch.int64, device)


def _row_order(sequence: SequenceStep) -> tuple[bool, int]:
    return len(sequence.token_ids) > 1, sequence.first_position

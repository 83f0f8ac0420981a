"""Lists of integers as tensors of a size that both ends know: one frame, and the rest of a long list."""

import torch
from torch import Tensor

_FRAME = 1024  # integers of the first frame; a step of decode tokens fits


def to_frames(values: list[int]) -> list[Tensor]:
    """One or two int64 tensors."""
    frame = new_frame()
    head = [len(values), *values[: _FRAME - 1]]
    frame[: len(head)] = torch.tensor(head)
    rest = values[_FRAME - 1 :]
    return [frame, torch.tensor(rest)] if rest else [frame]


def new_frame() -> Tensor:
    """Room for the first frame."""
    return torch.zeros(_FRAME, dtype=torch.int64)


def room_for_rest(frame: Tensor) -> Tensor | None:
    """Room for what follows a first frame, if anything does."""
    num_more = int(frame[0]) - (_FRAME - 1)
    return torch.empty(num_more, dtype=torch.int64) if num_more > 0 else None


def from_frames(frame: Tensor, rest: Tensor | None) -> list[int]:
    """Inverse of `to_frames`."""
    values: list[int] = frame[1 : 1 + int(frame[0])].tolist()
    return values if rest is None else values + rest.tolist()

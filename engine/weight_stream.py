"""The layers of a model that stay in host memory, brought to the device in turn through two slots.

    slot 0   | 20 computes | 22 comes ...... | 22 computes |
    slot 1   | 21 comes    | 21 computes | 23 comes        |        a layer comes as soon as the one before it in its
                                                                    slot was computed, into the next step, too

On CUDA a stream of its own copies; what is launched afterwards waits on the device, never here.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.layer_images import HostImage

NUM_SLOTS = 2


class Copier(Protocol):
    """Copies into slots, in the order of the calls."""

    def copy(self, slot: int, to: Tensor, source: Tensor) -> None:
        """Begins when what was launched before the last `release` of the slot is computed."""
        ...

    def arrive(self, slot: int) -> None:
        """What is launched from now on finds the slot's copy complete."""
        ...

    def release(self, slot: int) -> None:
        """What is launched from now on does not read the slot."""
        ...


class PlainCopier:
    """Of a CPU: copies are over when they were asked for."""

    def copy(self, slot: int, to: Tensor, source: Tensor) -> None:  # noqa: ARG002
        """See Copier."""
        to.copy_(source)

    def arrive(self, slot: int) -> None:
        """See Copier."""

    def release(self, slot: int) -> None:
        """See Copier."""


class StreamCopier:
    """Of CUDA: copies on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied, self._released = (
            [torch.cuda.Event() for _ in range(NUM_SLOTS)]  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def copy(self, slot: int, to: Tensor, source: Tensor) -> None:
        """See Copier."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released[slot])
            to.copy_(source, non_blocking=True)
            self._copied[slot].record(self._stream)

    def arrive(self, slot: int) -> None:
        """See Copier."""
        torch.cuda.current_stream().wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        """See Copier."""
        self._released[slot].record()


class WeightStream:
    """Layers of any kind, in turn, again and again."""

    def __init__(self, images: Sequence[HostImage], device: torch.device, copier: Copier) -> None:
        """At least as many as there are slots; the first ones come at once."""
        assert len(images) >= NUM_SLOTS
        self.num_layers = len(images)
        self._images = images
        self._copier = copier
        room = max(len(image.memory) for image in images)
        self._slots = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self._holds: list[int | None] = [None] * NUM_SLOTS
        for slot in range(NUM_SLOTS):
            copier.release(slot)  # memory may have been used for something else before
            self._bring(slot)

    @property
    def host_bytes(self) -> int:
        """That come to the device in every round."""
        return sum(len(image.memory) for image in self._images)

    @property
    def device_bytes(self) -> int:
        """That the slots take."""
        return sum(slot.nbytes for slot in self._slots)

    def on_device(self, number: int) -> list[Tensor]:
        """The tensors of a layer's image in the slot through which it comes."""
        return self._images[number].views(self._slots[number % NUM_SLOTS])

    def in_turn(self) -> Iterator[int]:
        """Each layer's number when it is there, until the next is asked for. A broken-off round does no harm."""
        for number in range(len(self._images)):
            slot = number % NUM_SLOTS
            if self._holds[slot] != number:
                self._copier.release(slot)
                self._bring(number)
            self._copier.arrive(slot)
            yield number
            self._copier.release(slot)
            following = number + NUM_SLOTS
            self._bring(following if following < len(self._images) else slot)

    def close(self) -> None:
        """The device is at rest, and reads host memory no more."""
        for image in self._images:
            image.close()

    def _bring(self, number: int) -> None:
        slot, source = number % NUM_SLOTS, self._images[number].memory
        self._copier.copy(slot, self._slots[slot][: len(source)], source)
        self._holds[slot] = number


def make_copier(device: torch.device) -> Copier:
    """The one for the device."""
    return StreamCopier(device) if device.type == "cuda" else PlainCopier()

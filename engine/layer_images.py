"""Tensors as one run of bytes in host memory, and as views of any memory that holds such a run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import ConfigurationError

_ALIGNMENT_BYTES = 256  # as of a device's own allocations


class HostImage:
    """The bytes of one layer, in host memory that a device can copy from on its own."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Copies them. Raises ConfigurationError when the host has no memory for it."""
        self._tensors = [tensor.to("meta") for tensor in tensors]
        self.memory = _host_memory(sum(map(_room, tensors)))
        self._is_pinned = device.type == "cuda"
        if self._is_pinned:
            _pin(self.memory)
        for place, tensor in zip(self.views(self.memory), tensors, strict=True):
            place.copy_(tensor)

    def close(self) -> None:
        """No device copies from it any more."""
        if self._is_pinned:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())  # type: ignore[no-untyped-call]
            self._is_pinned = False

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in an image at the start of `memory`, uint8."""
        views, offset = [], 0
        for tensor in self._tensors:
            views.append(memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            offset += _room(tensor)
        return views


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _host_memory(num_bytes: int) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise ConfigurationError(f"no memory for {num_bytes >> 20} MiB of a layer's weights: {error}") from error


def _pin(memory: Tensor) -> None:
    """By hand, since torch's own pinned memory is rounded up to a power of two."""
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))  # type: ignore[no-untyped-call]
    if status != 0:
        raise ConfigurationError(f"{memory.nbytes >> 20} MiB of host memory cannot be pinned: CUDA error {status}")

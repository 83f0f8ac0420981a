"""Memory that peers read: on a device, or, on CPU under Linux, in a memory file without a name.

A peer process on this machine can map the file through /proc and read it without a copy through a socket. No name can
be left behind: the memory goes with the last that maps it.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ConfigurationError


class SharedMemory:
    """`bytes`: uint8 [num_bytes], zeros. Raises ConfigurationError when the machine has no room; `what` it is for."""

    def __init__(self, num_bytes: int, device: torch.device, what: str) -> None:
        self._file: int | None = None
        if device.type == "cpu" and sys.platform == "linux":
            self._file = _allocate(num_bytes, what)
            self.bytes: Tensor = torch.from_file(str(self.path), shared=True, size=num_bytes, dtype=torch.uint8)
        else:
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    @property
    def path(self) -> Path | None:
        """The memory as a file that peers of this host can map while this process lives; None where there is none."""
        return Path(f"/proc/{os.getpid()}/fd/{self._file}") if self._file is not None else None

    def close(self) -> None:
        """Peers can map it no more; the memory goes with the last tensor that views it. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.bytes = self.bytes.new_empty(0)


def _allocate(num_bytes: int, what: str) -> int:
    """A memory file of zeros, every page taken now rather than with SIGBUS later; returns its descriptor."""
    available_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = os.memfd_create("baton")
    try:
        if num_bytes > available_bytes:
            raise OSError(f"the machine has {available_bytes >> 20} MiB")
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.close(file)
        raise ConfigurationError(f"no memory for {num_bytes >> 20} MiB of {what}: {error}") from error
    return file

"""A one-sided channel between ranks on GPUs of one host: the receiver maps the sender's pool and reads it.

The handle is opened on the receiver's GPU, which needs not see the sender's; between two GPUs it takes peer access
(NVLink, or PCIe that allows it). Nothing here waits for the sender's streams: KV is announced only once the engine has
synchronised with the step that wrote it. The sender's pool stays mapped until the channel ends.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigurationError, TransferFailed
from core.messages.to_rank import Span
from kv_transfer.channels.one_sided import PullingReceiver
from kv_transfer.channels.pool_handle import PoolHandle
from kv_transfer.channels.protocol import Terms
from kv_transfer.channels.shared_memory import OneSidedSender
from kv_transfer.spans import gather, require_inside, span_bytes

_POLL_S = 50e-6
_CUDA_MALLOC = b"c"  # second byte of torch's handle: memory that CUDA can open elsewhere by handle alone
_NOT_COUNTED = (b"/baton-not-counted", 0)  # a counter that is not there: torch leaves it alone
_NO_EVENT = (bytes(64), False)


@dataclass(frozen=True)
class CudaPlace:
    """Where a pool lies on a GPU of the host."""

    handle: bytes  # of the CUDA allocation that holds the pool
    num_bytes: int  # of the pool
    offset_bytes: int  # of the pool in its allocation
    device: str  # UUID of the GPU


class CudaIpcConnector:
    """Makes the ends of one rank's channels to ranks on GPUs of the same host."""

    kind = "cuda_ipc"

    def __init__(self, pool: Tensor) -> None:
        """`pool` is all of its storage, and lives at least as long as the connector. Raises ConfigurationError."""
        self._pool = pool
        self._storage = pool.untyped_storage()
        assert pool.data_ptr() == self._storage.data_ptr()
        share: Any = self._storage._share_cuda_  # without types in torch
        try:
            _, handle, num_bytes, offset_bytes, *self._counter, _, _ = share()
        except RuntimeError as error:
            raise ConfigurationError(f"the KV pool cannot be shared by CUDA IPC: {error}", field="channel") from error
        require_cuda_malloc(handle)
        device = str(torch.cuda.get_device_properties(pool.device).uuid)
        self._told = PoolHandle.of(pool, CudaPlace(handle, num_bytes, offset_bytes, device))

    @property
    def reach(self) -> str:
        """This boot of this host's kernel, and the namespace inside which CUDA opens handles."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} ipc:{Path('/proc/self/ns/ipc').stat().st_ino}"

    @property
    def rendezvous(self) -> str:
        """What opens the pool."""
        return self._told.encode()

    def sender_end(self, terms: Terms) -> OneSidedSender:
        """See Connector."""
        return OneSidedSender(f"{terms.channel} sender", self._pool)

    def receiver_end(self, terms: Terms, rendezvous: str) -> PullingReceiver:
        """See Connector."""

        def open_peer(aborted: threading.Event) -> _MappedPool:
            return _MappedPool(PoolHandle.decode(rendezvous, CudaPlace), self._pool, aborted)

        return PullingReceiver(f"{terms.channel} receiver", self._pool, open_peer)

    def close(self) -> None:
        """Gives back the one count that sharing took, so that the pool's memory is freed with its last tensor."""
        counter, self._counter = self._counter, []
        if counter:
            release: Any = self._storage._release_ipc_counter_cuda
            release(*counter)


def require_cuda_malloc(handle: bytes) -> None:
    """Raises ConfigurationError for memory of an expandable segment, whose handles only its own process may use."""
    if handle[1:2] != _CUDA_MALLOC:
        message = "cuda_ipc needs a KV pool in plain CUDA memory: drop expandable_segments from PYTORCH_CUDA_ALLOC_CONF"
        raise ConfigurationError(message, field="channel")


def require_whole(told: PoolHandle[CudaPlace], pool: Tensor) -> None:
    """As `PoolHandle.require_fits`; also refuses a handle whose size is not that of its shape."""
    shape = told.require_fits(pool)
    num_bytes = told.place.num_bytes
    if num_bytes != shape.numel() * shape.element_size():
        raise TransferFailed(f"{num_bytes} bytes do not hold a pool {told.shape} of {told.dtype}")


class _MappedPool:
    """A peer's pool in this process. Made and used in the channel's thread, whose current stream it sets."""

    def __init__(self, told: PoolHandle[CudaPlace], pool: Tensor, aborted: threading.Event) -> None:
        """Raises TransferFailed for a pool that does not fit, RuntimeError when CUDA cannot open it."""
        require_whole(told, pool)
        torch.cuda.set_device(pool.device)
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)  # torch also synchronises with it before it unmaps
        new_shared: Any = torch.UntypedStorage._new_shared_cuda
        place = told.place
        where = (place.handle, place.num_bytes, place.offset_bytes)
        try:
            storage = new_shared(pool.device.index, *where, *_NOT_COUNTED, *_NO_EVENT)
        except RuntimeError as error:
            raise TransferFailed(f"GPU {place.device} cannot be read from {pool.device}: {error}") from error
        self._pool = torch.empty(0, dtype=pool.dtype, device=pool.device).set_(storage).view(told.shape)
        self._slab = torch.empty(0, dtype=torch.uint8, device=pool.device)
        self._aborted = aborted

    def pull(self, source: Span, deadline: float) -> Tensor:
        """See PeerPool."""
        require_inside(self._pool, source)
        num_bytes = span_bytes(self._pool, source)
        if self._slab.numel() < num_bytes:
            self._slab = torch.empty(num_bytes, dtype=torch.uint8, device=self._pool.device)
        slab = self._slab[:num_bytes]
        gather(self._pool, source, slab)
        self._wait(deadline)
        return slab

    @contextmanager
    def stream(self) -> Iterator[None]:
        """See PeerPool."""
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def abort(self) -> None:
        """The lane's event tells `pull`."""

    def _wait(self, deadline: float) -> None:
        """A kernel cannot be called back: also a failure waits for it, so that nothing unmaps what it reads."""
        over: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        over.record(self._stream)
        while not over.query():
            if self._aborted.is_set() or time.monotonic() > deadline:
                self._stream.synchronize()
                raise TransferFailed("aborted, or not over before the deadline")
            time.sleep(_POLL_S)

"""One rank's memory for blocks below the device, and the copies between its places."""

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.config import TiersConfig
from core.errors import ConfigurationError, TransferFailed
from core.kv_layout import KVLayout
from core.messages.fleet import Empty
from core.messages.to_rank import TierMove

MOST_BLOCKS = 32  # of one move


class Store(Protocol):
    """Blocks of all layers, uint8 [n, bytes of a block] in host memory on their way in and out."""

    def read(self, slots: Sequence[int], blocks: Tensor) -> None:
        """Fills `blocks`."""
        ...

    def write(self, slots: Sequence[int], blocks: Tensor) -> None:
        """Keeps what `blocks` holds."""
        ...

    def close(self) -> None:
        """Frees the memory."""
        ...


class DeviceStore:
    """The KV pool [layers, blocks, ...] itself. On CUDA the copies have a stream of their own."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool.view(*pool.shape[:2], -1).view(torch.uint8)  # [layers, blocks, bytes of a block's layer]
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]

    def read(self, slots: Sequence[int], blocks: Tensor) -> None:
        """See Store."""
        by_layer = blocks.view(len(slots), self._pool.shape[0], -1)
        if self._stream is None:
            for number, slot in enumerate(slots):
                by_layer[number] = self._pool[:, slot]
            return
        with torch.cuda.stream(self._stream):
            by_layer.copy_(self._pool[:, self._index(slots)].transpose(0, 1), non_blocking=True)
        self._stream.synchronize()

    def write(self, slots: Sequence[int], blocks: Tensor) -> None:
        """See Store."""
        by_layer = blocks.view(len(slots), self._pool.shape[0], -1)
        if self._stream is None:
            for number, slot in enumerate(slots):
                self._pool[:, slot] = by_layer[number]
            return
        with torch.cuda.stream(self._stream):
            there = by_layer.to(self._pool.device, non_blocking=True)
            self._pool.index_copy_(1, self._index(slots), there.transpose(0, 1))
        self._stream.synchronize()

    def close(self) -> None:
        """The KV cache frees its own memory."""

    def _index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, device=self._pool.device)


class HostStore:
    """Host memory, locked for a device's copies. Raises ConfigurationError when there is not enough."""

    def __init__(self, num_slots: int, block_bytes: int, *, pinned: bool) -> None:
        try:
            self._memory = torch.empty(num_slots, block_bytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            size = num_slots * block_bytes >> 20
            raise ConfigurationError(f"tiers.host_mib: no memory for {size} MiB: {error}", field="host_mib") from error

    def read(self, slots: Sequence[int], blocks: Tensor) -> None:
        """See Store."""
        torch.index_select(self._memory, 0, torch.tensor(slots), out=blocks)

    def write(self, slots: Sequence[int], blocks: Tensor) -> None:
        """See Store."""
        self._memory.index_copy_(0, torch.tensor(slots), blocks)

    def close(self) -> None:
        """See Store."""
        self._memory = self._memory.new_empty(0)


class DiskStore:
    """A file without a name: it goes with the process, however that ends. Raises ConfigurationError for no room."""

    def __init__(self, num_slots: int, block_bytes: int, folder: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # until `close`
            os.posix_fallocate(self._file.fileno(), 0, num_slots * block_bytes)
        except OSError as error:
            raise ConfigurationError(f"tiers.disk_dir {folder}: {error}", field="disk_dir") from error

    def read(self, slots: Sequence[int], blocks: Tensor) -> None:
        """See Store. Raises TransferFailed."""
        for block, slot in zip(blocks.numpy(), slots, strict=True):
            if os.preadv(self._file.fileno(), [block.data], slot * len(block)) != len(block):
                raise TransferFailed(f"block {slot} on disk is cut short")

    def write(self, slots: Sequence[int], blocks: Tensor) -> None:
        """See Store. Raises TransferFailed."""
        for block, slot in zip(blocks.numpy(), slots, strict=True):
            if os.pwritev(self._file.fileno(), [block.data], slot * len(block)) != len(block):
                raise TransferFailed(f"block {slot} was not written whole")

    def close(self) -> None:
        """See Store."""
        self._file.close()


class TierStores:
    """All places of one rank, the device's pool first, and the thread that copies between them."""

    def __init__(self, pool: Tensor, config: TiersConfig, sizes: Mapping[str, int]) -> None:
        """`sizes` as `tier_sizes` gives them."""
        block_bytes = pool.nbytes // pool.shape[1]
        self._stores: list[Store] = [DeviceStore(pool)]
        if "host" in sizes:
            self._stores.append(HostStore(sizes["host"], block_bytes, pinned=pool.is_cuda))
        if "disk" in sizes:
            self._stores.append(DiskStore(sizes["disk"], block_bytes, Path(config.disk_dir)))
        self._passing = torch.empty(MOST_BLOCKS, block_bytes, dtype=torch.uint8, pin_memory=pool.is_cuda)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tiers")

    async def move(self, move: TierMove) -> Empty:
        """Of MOST_BLOCKS at most; in the order of the calls. Raises TransferFailed, and then nothing moves any more."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._move, move)
        return Empty()

    def close(self) -> None:
        """Waits for moves under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for store in self._stores:
            store.close()

    def _move(self, move: TierMove) -> None:
        source, destination = self._stores[move.source], self._stores[move.destination]
        passing = self._passing[: len(move.source_slots)]
        try:
            source.read(move.source_slots, passing)
            destination.write(move.destination_slots, passing)
        except (OSError, RuntimeError) as error:
            raise TransferFailed(f"blocks cannot be moved between tiers: {error}") from error


def tier_sizes(layout: KVLayout, config: TiersConfig) -> dict[str, int]:
    """Slots of each configured tier, the fastest first. Raises ConfigurationError for one that holds nothing."""
    configured = {"host": config.host_mib, "disk": config.disk_mib}
    sizes = {name: int(mib * 2**20) // layout.block_bytes_per_rank for name, mib in configured.items() if mib > 0}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigurationError(
                f"tiers.{name}_mib {configured[name]:g} holds no block of {layout.block_bytes_per_rank} bytes"
            )
    return sizes

"""The ranks of a tensor-parallel replica: collectives over Gloo (CPU) or NCCL (CUDA), without a default world.

control  Gloo, always: the first rank broadcasts what to compute as 64-bit integers
data     the control group itself on CPU, NCCL on CUDA: sums of activations, gathered logits
"""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from core.errors import PeerLost
from engine.rank_group import RankGroup, SingleRank

dist: Any = torch_distributed  # the stubs of stores and backends leave out most of their methods

_FRAME = 1024  # integers of the first message of a broadcast; a step of decode tokens fits


def connect_ranks(
    store_address: str, rank: int, size: int, device: torch.device, host: str = "127.0.0.1", timeout_s: float = 30.0
) -> RankGroup:
    """Meets the other ranks at the store, which the first rank hosts at `store_address` (host:port).

    `host` is this rank's own interface. Raises PeerLost when a rank is missing or silent for `timeout_s`.
    """
    if size == 1:
        return SingleRank()
    return TensorParallelGroup(store_address, rank, size, device, host, timeout_s)


class TensorParallelGroup:
    """A RankGroup of several processes. After a PeerLost it is of no more use."""

    def __init__(
        self, store_address: str, rank: int, size: int, device: torch.device, host: str, timeout_s: float
    ) -> None:
        self.rank = rank
        self.size = size
        store_host, port = store_address.rsplit(":", 1)
        timeout = timedelta(seconds=timeout_s)
        try:
            self._store = _open_store(store_host, int(port), timeout, hosts=rank == 0)
            self._control = self._connect_gloo(host, timeout)
            self._data = self._control if device.type == "cpu" else self._connect_nccl(device, timeout)
        except RuntimeError as error:
            raise PeerLost(f"rank {rank} of {size} could not meet the others at {store_address}: {error}") from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See RankGroup."""
        self._wait(lambda: self._data.allreduce([tensor]))
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """See RankGroup."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: self._data.allgather([parts], [tensor]))
        return torch.cat(parts, dim=-1) if self.rank == 0 else None

    def broadcast(self, values: list[int] | None, timeout_s: float | None = None) -> list[int]:
        """See RankGroup. Long lists take a second message."""
        frame = torch.zeros(_FRAME, dtype=torch.int64)
        if values is not None:
            head = [len(values), *values[: _FRAME - 1]]
            frame[: len(head)] = torch.tensor(head)
        self._broadcast(frame, timeout_s)
        count = int(frame[0])
        received: list[int] = frame[1 : count + 1].tolist()
        if count > _FRAME - 1:
            rest = torch.tensor(values[_FRAME - 1 :]) if values else torch.empty(count - _FRAME + 1, dtype=torch.int64)
            self._broadcast(rest, None)
            received += rest.tolist()
        return received

    def close(self) -> None:
        """Leaves the group; the others' next collective raises PeerLost."""
        for group in {id(group): group for group in (self._data, self._control)}.values():
            group.shutdown()

    def _broadcast(self, tensor: Tensor, timeout_s: float | None) -> None:
        options = dist.BroadcastOptions()
        if timeout_s is not None:
            options.timeout = timedelta(seconds=timeout_s)
        options.rootRank = 0
        self._wait(lambda: self._control.broadcast([tensor], options))

    def _connect_gloo(self, host: str, timeout: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1
        return dist.ProcessGroupGloo(dist.PrefixStore("control", self._store), self.rank, self.size, options)

    def _connect_nccl(self, device: torch.device, timeout: timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(dist.PrefixStore("data", self._store), self.rank, self.size, options)
        group.eager_connect_single_device(device)
        return group

    def _wait(self, start: Callable[[], Any]) -> None:
        """Gloo waits for the result, NCCL only orders the present stream after it."""
        try:
            start().wait()
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} of {self.size} lost another rank: {error}") from error


def _open_store(host: str, port: int, timeout: timedelta, *, hosts: bool) -> Any:
    """The rendezvous store; its host listens on `host` alone, where torch would take every interface."""
    if not hosts:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    try:
        descriptor = socket.create_server((host, port)).detach()
    except OSError as error:
        raise PeerLost(f"cannot host the rendezvous store at {host}:{port}: {error}") from error
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
    )

"""Where a replica's ranks find each other: a store on the first one, and groups of any of them, without a world."""

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed

from core.errors import PeerLost

dist: Any = torch_distributed  # the stubs of stores and backends leave out most of their methods

Group = Any  # a backend of torch.distributed


class RankStore:
    """One rank's connection to the rendezvous store at `address` (host:port). Raises PeerLost when it is not there."""

    def __init__(self, address: str, host: str, timeout_s: float, *, hosts: bool) -> None:
        """`host` is this rank's own interface; `hosts`: the store lives here."""
        store_host, port = address.rsplit(":", 1)
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        try:
            self._store = _open_store(store_host, int(port), self._timeout, hosts=hosts)
            self._device = dist.ProcessGroupGloo.create_device(hostname=host)
        except RuntimeError as error:
            raise PeerLost(f"no rendezvous store at {address}: {error}") from error

    def gloo(self, name: str, rank: int, size: int, timeout_s: float | None = None) -> Group:
        """A group of host memory. Raises RuntimeError when a member does not come in time."""
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._timeout if timeout_s is None else timedelta(seconds=timeout_s)
        options._devices = [self._device]
        options._threads = 1
        return dist.ProcessGroupGloo(dist.PrefixStore(name, self._store), rank, size, options)

    def nccl(self, name: str, rank: int, size: int, device: torch.device) -> Group:
        """A group of device memory. Raises RuntimeError as above."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        group = dist.ProcessGroupNCCL(dist.PrefixStore(name, self._store), rank, size, options)
        group.eager_connect_single_device(device)
        return group


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

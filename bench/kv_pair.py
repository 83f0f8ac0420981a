"""Two processes, a pool each, and every way to move bytes from one to the other: our channels, memcpy, plain TCP.

Both know the cases. The other process obeys requests of a few bytes over TCP: plain TCP's are answered by the bytes,
from pool into pool, those of a channel are grants and answered over the channel.
"""

import ctypes
import multiprocessing
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from core.config import TransferConfig
from core.kv_layout import KVLayout
from core.messages.to_rank import Copy, SlabHeader, Span
from kv_transfer.channels.gloo import gloo_connector
from kv_transfer.channels.protocol import ChannelId, Connector, Landing, Passage, ReceiverEnd, SenderEnd, Terms
from kv_transfer.channels.shared_memory import SharedMemoryConnector
from kv_transfer.channels.tcp import TcpConnector
from kv_transfer.plan import split_into_slabs

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
SLAB_BYTES = int(TransferConfig().slab_mib * 2**20)
CHANNELS = ("shared_memory", "tcp", "gloo")
_LENGTH = struct.Struct("!Q")
_GRANT = struct.Struct("!BBQ")  # index of a channel, index of a case, sequence number of its first slab


@dataclass(frozen=True)
class Case:
    """What one measurement moves."""

    name: str
    num_bytes: int
    slabs: tuple[Copy, ...]


def layout_of(num_layers: int) -> KVLayout:
    """Blocks of 32 KiB a layer."""
    return KVLayout(num_layers, num_kv_heads=8, head_dim=64, block_size=16, dtype="bfloat16", tensor_parallel=1)


def contiguous(num_bytes: int, layout: KVLayout) -> Case:
    """The first blocks of a pool of one layer."""
    blocks = tuple(range(num_bytes // layout.block_bytes_per_rank))
    return _case(f"{_size(num_bytes)} contiguous", layout, blocks, blocks)


def scattered(num_blocks: int, layout: KVLayout, seed: int) -> Case:
    """Every layer of blocks from anywhere to anywhere, in pools of twice as many."""
    chosen = random.Random(seed)
    source, destination = (tuple(chosen.sample(range(2 * num_blocks), num_blocks)) for _ in range(2))
    return _case(f"{num_blocks} x {_size(layout.block_bytes_per_rank)} scattered", layout, source, destination)


def shared_pool(path: Path, layout: KVLayout, num_blocks: int) -> Tensor:
    """A pool [layers, blocks, 2, heads, size, dim] in a file that other processes can map, all pages in memory."""
    path.touch()
    shape = (layout.num_layers, num_blocks, 2, layout.heads_per_rank, layout.block_size, layout.head_dim)
    numel = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=numel, dtype=torch.bfloat16).view(shape).fill_(1)


class Pair:
    """The receiving process's view of one pool size: measures one case after another."""

    def __init__(self, folder: Path, layout: KVLayout, num_blocks: int, cases: Sequence[Case]) -> None:
        """Starts the sending process."""
        self._cases = tuple(cases)
        pipe, far_pipe = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process
        self._process = process(target=_send, args=(far_pipe, folder / "sender", layout, num_blocks, self._cases))
        self._process.start()
        self._pool = shared_pool(folder / "receiver", layout, num_blocks)
        rendezvous, port = pipe.recv()
        self._theirs = torch.from_file(str(folder / "sender"), True, self._pool.numel(), dtype=torch.bfloat16)
        self._raw, self._grants = _connect(port), _connect(port)
        self._connectors = _connectors(self._pool, folder / "receiver")
        self._ends: dict[str, ReceiverEnd] = {
            kind: connector.receiver_end(_terms(kind), rendezvous[kind]) for kind, connector in self._connectors.items()
        }
        self._next = dict.fromkeys(CHANNELS, 0)

    def ways(self) -> dict[str, Callable[[Case], float]]:
        """Every way to move a case's bytes, by name; each returns the seconds it took."""
        channels = {kind: self._channel(kind) for kind in CHANNELS}
        return {"memcpy": self._memcpy, "raw TCP": self._raw_tcp} | channels

    def check(self, case: Case) -> None:
        """Raises AssertionError unless every channel moves the case byte for byte."""
        ours, theirs = (pool.view(self._pool.shape).view(torch.int16) for pool in (self._pool, self._theirs))
        for kind in CHANNELS:
            self._pool.zero_()
            self._channel(kind)(case)
            for slab in case.slabs:
                layers = slice(slab.source.first_layer, slab.source.first_layer + slab.source.num_layers)
                came = ours[layers, list(slab.destination.blocks)]
                assert came.equal(theirs[layers, list(slab.source.blocks)]), f"{kind}: {case.name}"

    def close(self) -> None:
        """Ends both processes' ends."""
        self._grants.close()
        self._raw.close()
        for end in self._ends.values():
            end.abort("over")
        for connector in self._connectors.values():
            connector.close()
        self._process.join()

    def _channel(self, kind: str) -> Callable[[Case], float]:
        def move(case: Case) -> float:
            first = self._next[kind]
            self._next[kind] += len(case.slabs)
            headers = _headers(case, first)
            grant = _GRANT.pack(CHANNELS.index(kind), self._cases.index(case), first)
            begun_at = time.perf_counter()
            if kind != "shared_memory":  # one-sided: nobody needs to be told
                self._grants.sendall(grant)
            landing, end = Landing(), self._ends[kind]
            done: list[Future[Passage]] = [
                end.fetch(header, slab.destination, landing, TIMEOUT_S)
                for header, slab in zip(headers, case.slabs, strict=True)
            ]
            for future in done:
                future.result()
            return time.perf_counter() - begun_at

        return move

    def _memcpy(self, case: Case) -> float:
        begun_at = time.perf_counter()
        ctypes.memmove(self._pool.data_ptr(), self._theirs.data_ptr(), case.num_bytes)
        return time.perf_counter() - begun_at

    def _raw_tcp(self, case: Case) -> float:
        place = _bytes_of(self._pool)[: case.num_bytes]
        begun_at = time.perf_counter()
        self._raw.sendall(_LENGTH.pack(case.num_bytes))
        while place:
            place = place[self._raw.recv_into(place) :]
        return time.perf_counter() - begun_at


def _send(pipe: Connection, path: Path, layout: KVLayout, num_blocks: int, cases: Sequence[Case]) -> None:
    """The other process: sends what it is asked for until nobody asks any more."""
    torch.set_num_threads(1)
    pool = shared_pool(path, layout, num_blocks)
    pool.view(torch.int16).random_()
    connectors = _connectors(pool, path)
    ends: dict[str, SenderEnd] = {kind: made.sender_end(_terms(kind)) for kind, made in connectors.items()}
    listener = socket.create_server((HOST, 0))
    pipe.send(({kind: made.rendezvous for kind, made in connectors.items()}, listener.getsockname()[1]))
    raw, grants = (listener.accept()[0] for _ in range(2))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_answer_raw, args=(raw, pool), daemon=True).start()
    while grant := grants.recv(_GRANT.size, socket.MSG_WAITALL):
        kind, index, first = _GRANT.unpack(grant)
        for header in _headers(cases[index], first):
            ends[CHANNELS[kind]].send(header, TIMEOUT_S)
    for end in ends.values():
        end.abort("over")
    for connector in connectors.values():
        connector.close()


def _answer_raw(connection: socket.socket, pool: Tensor) -> None:
    while request := connection.recv(_LENGTH.size, socket.MSG_WAITALL):
        connection.sendall(_bytes_of(pool)[: _LENGTH.unpack(request)[0]])


def _connectors(pool: Tensor, path: Path) -> dict[str, Connector]:
    return {
        "shared_memory": SharedMemoryConnector(pool, path),
        "tcp": TcpConnector(HOST, pool, TIMEOUT_S),
        "gloo": gloo_connector(HOST, pool, TIMEOUT_S),
    }


def _case(name: str, layout: KVLayout, source: tuple[int, ...], destination: tuple[int, ...]) -> Case:
    spans = (Span(0, layout.num_layers, blocks, 0, layout.heads_per_rank) for blocks in (source, destination))
    slabs = split_into_slabs(Copy(0, *spans), layout, SLAB_BYTES)
    return Case(name, len(source) * layout.block_bytes_per_rank, slabs)


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection((HOST, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _headers(case: Case, first: int) -> list[SlabHeader]:
    return [SlabHeader(first + index, "b", 1, slab.source) for index, slab in enumerate(case.slabs)]


def _terms(kind: str) -> Terms:
    return Terms(ChannelId("sender", f"receiver of {kind}", 1, 1), "token")


def _bytes_of(pool: Tensor) -> memoryview:
    return pool.view(-1).view(torch.uint8).numpy().data


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 2**20 else f"{num_bytes >> 10} KiB"

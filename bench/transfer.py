"""How fast scattered KV blocks move from one process's pool to another's, by channel kind.

Bound: memory bandwidth. The bytes must be read once and written once, so no channel beats one memcpy of the same bytes
into memory that another process owns, measured here, in the same run, by the same receiving process. A one-sided
channel copies twice (gather rows, place rows), a two-sided one gathers, crosses the kernel's TCP stack, and scatters.

    python -m bench.transfer --mib 32 --repeats 10
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from core.block_hash import HASH_SCHEME
from core.config import ChannelKind, TransferConfig
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged
from core.messages.to_rank import CloseChannel, Connect, Connected, FetchBlocks, Ready
from kv_transfer.agent import TransferAgent
from kv_transfer.channels.select import make_connector
from kv_transfer.plan import plan_copies

LAYOUT = KVLayout(num_layers=16, num_kv_heads=8, head_dim=64, block_size=16, dtype="bfloat16", tensor_parallel=1)
COMPATIBILITY = Compatibility("bench", "0", "bfloat16", 16, HASH_SCHEME)
CHANNELS: tuple[ChannelKind, ...] = ("gloo", "shared_memory")
HOST = "127.0.0.1"
Message = Connect | Ready | CloseChannel


class PipeControl:
    """PeerControl over a pipe; the calls of one receiver come one at a time."""

    def __init__(self, pipe: Connection | None) -> None:
        self._pipe = pipe
        self._lock = asyncio.Lock()

    async def connect(self, address: str, message: Connect) -> Connected:
        """See PeerControl."""
        del address
        answer = await self._call(message)
        assert isinstance(answer, Connected)
        return answer

    async def ready(self, address: str, message: Ready) -> Acknowledged:
        """See PeerControl."""
        del address
        await self._call(message)
        return Acknowledged()

    async def close(self, address: str, message: CloseChannel) -> Acknowledged:
        """See PeerControl."""
        del address
        await self._call(message)
        return Acknowledged()

    async def _call(self, message: Message) -> object:
        assert self._pipe is not None, "the sender calls nobody"
        async with self._lock:
            self._pipe.send(message)
            return await asyncio.to_thread(self._pipe.recv)


def shared_pool(path: Path, num_blocks: int) -> Tensor:
    """A zeroed pool [layers, blocks, 2, heads, size, dim] in a file that other processes can map."""
    path.touch()
    shape = (LAYOUT.num_layers, num_blocks, 2, LAYOUT.num_kv_heads, LAYOUT.block_size, LAYOUT.head_dim)
    numel = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=numel, dtype=torch.bfloat16).view(shape)


def make_agent(address: str, pool: Tensor, path: Path, channel: ChannelKind, pipe: Connection | None) -> TransferAgent:
    """An agent with the default configuration but for its channel."""
    config = TransferConfig(channel=channel)
    return TransferAgent(
        address=address,
        incarnation=1,
        pool=pool,
        layout=LAYOUT,
        compatibility=COMPATIBILITY,
        config=config,
        connector=make_connector(config, HOST, pool, path),
        control=PipeControl(pipe),
        may_read=lambda _: True,
    )


def send_process(pipe: Connection, path: Path, num_blocks: int) -> None:
    """The sender: answers control messages until the pipe closes, with one agent per channel kind in turn."""
    torch.set_num_threads(1)
    pool = shared_pool(path, num_blocks)
    pool.view(torch.int16).random_()
    asyncio.run(_serve(pipe, path, pool))


async def _serve(pipe: Connection, path: Path, pool: Tensor) -> None:
    for channel in CHANNELS:
        agent = make_agent("sender", pool, path, channel, None)
        pipe.send("up")
        while (message := await asyncio.to_thread(pipe.recv)) is not None:
            if isinstance(message, Connect):
                pipe.send(await agent.on_connect(message))
            elif isinstance(message, Ready):
                pipe.send(await agent.on_ready(message))
            else:
                pipe.send(await agent.on_close(message))
        await agent.close()


async def measure(
    channel: ChannelKind, pipe: Connection, pool: Tensor, path: Path, pairs: list[tuple[int, int]], repeats: int
) -> list[float]:
    """Seconds of each fetch of all (source block, destination block) pairs, after one that connects and warms up."""
    assert pipe.recv() == "up"
    agent = make_agent("receiver", pool, path, channel, pipe)
    sources, destinations = zip(*pairs, strict=True)
    copies = plan_copies(LAYOUT, LAYOUT, 0, 0, LAYOUT.num_layers, sources, destinations)
    order = FetchBlocks("bench", 1, ("sender",), LAYOUT, copies, timeout_s=60.0)
    seconds = [(await agent.fetch(order)).seconds for _ in range(repeats + 1)][1:]
    await agent.close()
    pipe.send(None)
    return seconds


def measure_bound(source: Tensor, num_bytes: int, repeats: int) -> list[float]:
    """Seconds of one memcpy of `num_bytes` from the other process's pool."""
    flat = source.view(-1).view(torch.int64)[: num_bytes // 8]
    target = torch.empty_like(flat)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(flat)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_moved = arguments.mib * 2**20 // LAYOUT.block_bytes_per_rank
    num_bytes, num_blocks = num_moved * LAYOUT.block_bytes_per_rank, 2 * num_moved
    chosen = random.Random(arguments.seed)
    pairs = list(zip(*(chosen.sample(range(num_blocks), num_moved) for _ in range(2)), strict=True))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        ours, theirs = Path(folder, "receiver"), Path(folder, "sender")
        pool = shared_pool(ours, num_blocks)
        pipe, far_pipe = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=send_process, args=(far_pipe, theirs, num_blocks))
        process.start()
        rates = {}
        for channel in CHANNELS:
            seconds = asyncio.run(measure(channel, pipe, pool, ours, pairs, arguments.repeats))
            rates[channel] = num_bytes / statistics.median(seconds) / 1e9
        process.join()
        bound = num_bytes / statistics.median(measure_bound(shared_pool(theirs, num_blocks), num_bytes, 10)) / 1e9
    print(f"{arguments.mib} MiB of scattered blocks, {LAYOUT.block_bytes_per_rank // 1024} KiB each, two processes")
    for name, rate in [("memcpy (bound)", bound), *rates.items()]:
        print(f"{name:16} {rate:6.2f} GB/s  {num_bytes / rate / 1e6:7.2f} ms  {rate / bound:5.0%}")
    print(json.dumps({
        "bench": "transfer", **vars(arguments), "bound_gb_s": round(bound, 2),
        "gb_s": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio": {name: round(rate / bound, 3) for name, rate in rates.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()

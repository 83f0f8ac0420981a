"""A real second process for tensor parallel tests, ended whatever happens."""

import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import PeerLost
from engine.runner import ModelRunner
from engine.tensor_parallel import connect_ranks
from tests.engine.plain_engine import CPU, make_runner

STOPPED, LOST = 0, 3  # exit codes of the follower


def _follow(checkpoint: Path, store_address: str, max_silence_s: float) -> None:
    group = connect_ranks(store_address, 1, 2, CPU)
    runner = make_runner(checkpoint, group=group)
    try:
        for batch in runner.launches(max_silence_s):
            runner.execute_launched(batch)
    except PeerLost:
        raise SystemExit(LOST) from None
    finally:
        runner.close()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def two_ranks(checkpoint: Path, max_silence_s: float = 60.0) -> Iterator[tuple[ModelRunner, multiprocessing.Process]]:
    """The leading runner of a replica of two ranks, and the process of the other rank."""
    address = free_address()
    context = multiprocessing.get_context("spawn")
    follower = context.Process(target=_follow, args=(checkpoint, address, max_silence_s))
    follower.start()
    try:
        runner = make_runner(checkpoint, group=connect_ranks(address, 0, 2, CPU))
        yield runner, follower
        runner.close()
        follower.join(20)
    finally:
        if follower.is_alive():
            follower.kill()
            follower.join()

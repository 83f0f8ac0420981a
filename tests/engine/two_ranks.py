"""A real second process for tests of tensor parallel ranks and pipeline stages, ended whatever happens."""

import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import PeerLost
from engine.checkpoint import load_model_spec
from engine.rank_links import connect_ranks
from engine.runner import ModelRunner
from tests.engine.plain_engine import BLOCK_SIZE, CPU, make_runner

STOPPED, LOST = 0, 3  # exit codes of followers

Degrees = tuple[int, int]  # tensor parallel, pipeline parallel
TENSOR_PARALLEL, STAGES = (2, 1), (1, 2)


def connected_runner(checkpoint: Path, store_address: str, rank: int, degrees: Degrees) -> ModelRunner:
    tensor_parallel, pipeline_parallel = degrees
    layout = load_model_spec(checkpoint).kv_layout(tensor_parallel, BLOCK_SIZE, pipeline_parallel)
    return make_runner(checkpoint, layout=layout, links=connect_ranks(store_address, rank, layout, CPU))


def _follow(checkpoint: Path, store_address: str, rank: int, degrees: Degrees, max_silence_s: float) -> None:
    runner = connected_runner(checkpoint, store_address, rank, degrees)
    try:
        for orders in runner.launches(max_silence_s):
            runner.execute_launched(orders)
    except PeerLost:
        raise SystemExit(LOST) from None
    finally:
        runner.close()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def ranks(
    checkpoint: Path, degrees: Degrees, max_silence_s: float = 60.0
) -> Iterator[tuple[ModelRunner, list[multiprocessing.Process]]]:
    """The leading runner of a replica, and the processes of the other ranks."""
    address = free_address()
    context = multiprocessing.get_context("spawn")
    followers = [
        context.Process(target=_follow, args=(checkpoint, address, rank, degrees, max_silence_s))
        for rank in range(1, degrees[0] * degrees[1])
    ]
    for follower in followers:
        follower.start()
    try:
        runner = connected_runner(checkpoint, address, 0, degrees)
        yield runner, followers
        runner.close()
        for follower in followers:
            follower.join(20)
    finally:
        for follower in followers:
            if follower.is_alive():
                follower.kill()
                follower.join()


@contextmanager
def two_ranks(
    checkpoint: Path, max_silence_s: float = 60.0, degrees: Degrees = TENSOR_PARALLEL
) -> Iterator[tuple[ModelRunner, multiprocessing.Process]]:
    """The leading runner of a replica of two ranks, and the process of the other rank."""
    with ranks(checkpoint, degrees, max_silence_s) as (runner, (follower,)):
        yield runner, follower

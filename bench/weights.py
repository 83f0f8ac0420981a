"""Seconds from launching a rank to ready, its weights read from disk or from a living rank of another replica.

Bound: the same start with the checkpoint in the page cache. Before a cold start the kernel is asked to drop the
checkpoint's pages, which needs no privileges; `cold read` is one thread reading the files after that. Before the starts
the engine's own load is measured in GB/s, in this process, cold and cached: parameters read, and put together, which on
a CPU repacks them; bound by the same files read by one thread.

    python -m bench.weights --shape 1b --rounds 3
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.random_checkpoint import SHAPES, write_random_checkpoint
from bench.rank_processes import RankProcess, free_address, rank_processes, replica_ranks
from bench.report import print_json, print_table
from core.config import ModelConfig, PoolConfig, RankResources, TransferConfig
from core.messages.fleet import Role
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.kernels import TorchKernels
from engine.model_parameters import Share, list_parameters
from engine.weights import assemble
from worker.spec import RankSpec

BLOCK_SIZE = 16
START_TIMEOUT_S = 300.0
SAID = "weights came from: "
_READ_BYTES = 2**24


@dataclass(frozen=True)
class Way:
    """One kind of start."""

    name: str
    is_cold: bool
    borrows: bool


WAYS = (
    Way("disk, cached", is_cold=False, borrows=False),
    Way("disk, cold", is_cold=True, borrows=False),
    Way("fastest, cached", is_cold=False, borrows=True),
    Way("fastest, cold", is_cold=True, borrows=True),
)


@dataclass(frozen=True)
class Start:
    """One start; `sources` is what the rank logged of its weights."""

    way: str
    ready_s: float
    sources: str


async def time_start(way: Way, spec: RankSpec, lender: str, checkpoint: Path, folder: Path) -> Start:
    """A rank's launch to ready."""
    prepare = drop_cached if way.is_cold else read_whole
    await asyncio.to_thread(prepare, checkpoint)
    transfer = spec.transfer.model_copy(update={"weights_from": "fastest" if way.borrows else "disk"})
    late = replace(spec, replica_id="late", rank_addresses=(free_address(),), transfer=transfer)
    rank = RankProcess(replace(late, weight_lenders=(lender,)), folder)
    started = time.perf_counter()
    async with rank_processes([rank], START_TIMEOUT_S):
        ready_s = time.perf_counter() - started
    said = [line.split(SAID)[1] for line in rank.log().splitlines() if SAID in line]
    return Start(way.name, ready_s, said[0] if said else "")


async def measure(args: argparse.Namespace, checkpoint: Path, folder: Path) -> list[Start]:
    """All ways in turn, beside one rank that lives all the while."""
    pool = PoolConfig(
        device=args.device, kv_cache_mib=64, resources_per_rank=RankResources(num_threads=args.threads), num_blocks=64
    )
    transfer = TransferConfig(channel=args.channel)
    (spec,) = replica_ranks("living", Role.DECODE, ModelConfig(path=str(checkpoint)), pool, transfer, BLOCK_SIZE)
    starts = []
    async with rank_processes([RankProcess(spec, folder)], START_TIMEOUT_S) as living:
        (info,) = living.values()
        for index in range(args.rounds):
            for way in WAYS[:: 1 if index % 2 else -1]:
                starts.append(await time_start(way, spec, info.address, checkpoint, folder))
    return starts


def read_whole(checkpoint: Path) -> None:
    """Into the page cache."""
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(_READ_BYTES):
                pass


def drop_cached(checkpoint: Path) -> None:
    """Out of the page cache, but for pages that a process has mapped."""
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_parameters(checkpoint: Path) -> None:
    """As the engine cuts them out of the files."""
    for _ in _named_parameters(checkpoint):
        pass


def load_weights(checkpoint: Path) -> None:
    """Reads parameters and puts them together for a CPU."""
    spec = load_model_spec(checkpoint, None)
    share = Share(0, spec.kv_layout(1, BLOCK_SIZE))
    assemble(spec, share, torch.device("cpu"), _named_parameters(checkpoint), TorchKernels())


def _named_parameters(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    spec = load_model_spec(checkpoint, None)
    parameters = list_parameters(spec, Share(0, spec.kv_layout(1, BLOCK_SIZE)))
    read = CheckpointReader(checkpoint, spec, torch.device("cpu")).read(parameters)
    yield from zip((parameter.name for parameter in parameters), read, strict=True)


def measure_loads(checkpoint: Path, num_bytes: int) -> dict[str, dict[str, float]]:
    """GB/s by what is done and where the files are."""
    rates: dict[str, dict[str, float]] = {}
    for name, work in (("one reader", read_whole), ("parameters", read_parameters), ("load", load_weights)):
        drop_cached(checkpoint)
        cold_s, cached_s = seconds_of(work, checkpoint), seconds_of(work, checkpoint)
        rates[name] = {"cold": num_bytes / cold_s / 1e9, "cached": num_bytes / cached_s / 1e9}
    return rates


def seconds_of(work: Callable[[Path], None], checkpoint: Path) -> float:
    """Wall clock."""
    started = time.perf_counter()
    work(checkpoint)
    return time.perf_counter() - started


def main() -> None:
    """Prints a table and one JSON line."""
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint = folder / "model"
        write_random_checkpoint(checkpoint, SHAPES[args.shape])
        num_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        loads = measure_loads(checkpoint, num_bytes)
        starts = asyncio.run(measure(args, checkpoint, folder))
    of_way = {way.name: [start.ready_s for start in starts if start.way == way.name] for way in WAYS}
    limit = statistics.median(of_way["disk, cached"])
    print(f"{num_bytes / 1e9:.2f} GB")
    bound = loads["one reader"]
    print_table(
        ("GB/s", "cold", "of one reader", "cached", "of one reader"),
        [
            (name, *(cell for way, rate in rates.items() for cell in (f"{rate:.2f}", f"{rate / bound[way]:.2f}")))
            for name, rates in loads.items()
        ],
    )
    print_table(
        ("weights", "ready s", "of the cached start", "last start's sources"),
        [
            (
                name,
                f"{statistics.median(seconds):.2f}",
                f"{statistics.median(seconds) / limit:.2f}",
                [start.sources for start in starts if start.way == name][-1],
            )
            for name, seconds in of_way.items()
        ],
    )
    print_json(
        "weights",
        args,
        checkpoint_bytes=num_bytes,
        loads_gb_s=loads,
        results=[asdict(start) for start in starts],
    )


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--channel", default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where the checkpoint is written: on the disk in question")
    return parser.parse_args()


if __name__ == "__main__":
    main()

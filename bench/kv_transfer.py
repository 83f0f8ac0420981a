"""How fast KV blocks move from one process's pool to another's, by channel, size and layout.

Bounds, measured in the same rounds by the same two processes, in the environment of ranks, in which large copies are
faster than by default. In one host: memory bandwidth; every byte is read once and written once, so nothing beats one
memcpy of as many contiguous bytes, in one thread, out of the other process's pool. Over a network stack: a plain TCP
socket that answers a request with as many contiguous bytes.
A channel is timed from its grant to its last slab's landing, control plane aside: two-sided kinds are granted by a few
bytes over TCP, as plain TCP is asked; a one-sided kind asks nobody. Ratios are medians over rounds of ratios inside a
round, since machines are shared.

    python -m bench.kv_transfer --largest-mib 1024 --mooncake-python PATH --nixl-python PATH
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from bench.kv_pair import Case, Pair, contiguous, layout_of, scattered
from bench.kv_peer_process import KvPeer
from bench.report import print_json, print_table
from worker.spec import RANK_ENVIRONMENT

SIZES = tuple(2**exponent for exponent in (16, 20, 24, 28, 30))
NUM_SCATTERED = 64
AT_LEAST_BYTES = 2**26  # moved per kind and round

Way = Callable[[Case], float]
Rounds = list[float]  # seconds, the median of each round


def measure(case: Case, ways: dict[str, Way], num_rounds: int) -> dict[str, Rounds]:
    """Every way in turn, the order turned round after each round; the first round warms up and is dropped."""
    repeats = min(20, max(1, AT_LEAST_BYTES // case.num_bytes))
    found: dict[str, Rounds] = {name: [] for name in ways}
    for index in range(num_rounds + 1):
        names = list(ways)[:: 1 if index % 2 else -1]
        for name in names:
            found[name].append(statistics.median(ways[name](case) for _ in range(repeats)))
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(bound: Rounds, measured: Rounds) -> float:
    """Throughput over a bound's, by rounds."""
    return statistics.median(limit / own for limit, own in zip(bound, measured, strict=True))


def rows_of(case: Case, found: dict[str, Rounds]) -> list[dict[str, str | float]]:
    """One row per way."""
    return [
        {
            "case": case.name,
            "way": name,
            "ms": round(statistics.median(seconds) * 1e3, 3),
            "gb_s": round(case.num_bytes / statistics.median(seconds) / 1e9, 2),
            "best_gb_s": round(case.num_bytes / min(seconds) / 1e9, 2),
            "of_memcpy": round(ratio(found["memcpy"], seconds), 3),
            "of_raw_tcp": round(ratio(found["raw TCP"], seconds), 3),
        }
        for name, seconds in found.items()
    ]


def main() -> None:
    """Prints a table and one JSON line."""
    args = parse()
    run_as_ranks_do()
    torch.set_num_threads(1)
    rows = []
    sizes = [size for size in SIZES if size <= args.largest_mib * 2**20]
    flat, deep = layout_of(num_layers=1), layout_of(num_layers=16)
    plans = [
        (flat, sizes[-1] // flat.block_bytes_per_rank, [contiguous(size, flat) for size in sizes]),
        (deep, 2 * NUM_SCATTERED, [scattered(NUM_SCATTERED, deep, args.seed)]),
    ]
    with ExitStack() as peers:
        others = {name: peers.enter_context(closing(peer)) for name, peer in started_peers(args, sizes[-1])}
        for layout, num_blocks, cases in plans:
            with (
                tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
                closing(Pair(Path(folder), layout, num_blocks, cases)) as pair,
            ):
                for case in cases:
                    pair.check(case)
                    ways = pair.ways() | {name: peer.move for name, peer in others.items()}
                    rows += rows_of(case, measure(case, ways, args.rounds))
    print_table(tuple(rows[0]), [[str(value) for value in row.values()] for row in rows])
    print_json("kv_transfer", args, rows=rows)


def run_as_ranks_do() -> None:
    """The C library reads the environment of ranks when a process starts: starts this one anew, unless it has it."""
    if not RANK_ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | RANK_ENVIRONMENT)


def started_peers(args: argparse.Namespace, largest_bytes: int) -> Iterable[tuple[str, KvPeer]]:
    """Other transfer engines, where a Python that has them was named."""
    for name, python in (("mooncake", args.mooncake_python), ("nixl", args.nixl_python)):
        if python is not None:
            yield name, KvPeer(python, name, max(largest_bytes, 2 * NUM_SCATTERED * 2**19))


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest-mib", type=int, default=256, help="1024 needs 3 GiB, 5 with both peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mooncake-python", type=Path, help="interpreter with mooncake-transfer-engine: its TCP")
    parser.add_argument("--nixl-python", type=Path, help="interpreter with nixl: UCX, which takes shared memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What a decision of the global scheduler takes, by size of fleet, index and prompt; and the index's memory and events.

Bound of a decision: looking each block of the prompt up once, in a dictionary too large for any cache. Bound of an
event: putting its blocks into one. Both are measured in the same run on plain dictionaries of the same size, and `of
limit` is the bound's share of what was taken. A block cannot take less than its key of 16 bytes and a pointer.

The fleet is made up (bench/scheduler_fleet.py): half of the replicas prefill, the others decode batches of 20 to 80;
16 system prompts are cached everywhere, every chain of 62 blocks on one replica, every tenth on three. Half of the
prompts are hits. `match` and `decide` are timed by themselves; `own` counts this thread's time for both alone, not what
others took of its core; `dispatch` is a whole plan, booked and logged nowhere.
With --dynamo-python, the interpreter of an environment with ai-dynamo-runtime, its KV index (RadixTree, by its Python
binding) and its selection service (8 workers, events over ZMQ) answer in turns with ours.

After `baton compile` the decisions run as machine code; the JSON line says which it was.

    python -m bench.scheduler
    python -m bench.scheduler --replicas 1000 --blocks 10000000 --dynamo-python PATH/bin/python
"""

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.http import percentile
from bench.peer_process import PeerProcess
from bench.report import print_json, print_table
from bench.scheduler_fleet import BLOCK_SIZE, CHAIN, ScheduledFleet
from core.block_hash import BlockKey

PEER_SCRIPT = Path(__file__).with_name("index_peer.py")
Found = dict[str, float]


def main() -> None:
    """Prints the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 100, 1000])
    parser.add_argument("--blocks", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[CHAIN * BLOCK_SIZE, 32_768])
    parser.add_argument("--requests", type=int, default=1000, help="timed, per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dynamo-python", type=Path, help="an interpreter with ai-dynamo-runtime")
    args = parser.parse_args()
    rows: list[Found] = []
    indexes: list[Found] = []
    peers: list[Found] = []
    for num_blocks in args.blocks:
        for num_replicas in args.replicas:
            before = resident_bytes()
            fleet = ScheduledFleet(num_replicas, num_blocks, args.seed)
            gc.collect()
            sizes = {"replicas": num_replicas, "blocks": num_blocks}
            indexes.append(sizes | measure_index(fleet, resident_bytes() - before))
            for num_tokens in args.tokens:
                rows.append(sizes | {"tokens": num_tokens} | measure_decisions(fleet, num_tokens, args.requests))
            if args.dynamo_python:
                peers.append(sizes | measure_peer(args.dynamo_python, fleet, num_replicas, num_blocks, args.requests))
            seconds, num_held = fleet.remove_one()
            indexes[-1] |= {"remove_us_per_block": 1e6 * seconds / num_held}
            del fleet
            gc.collect()
    print_found("decision, us", rows)
    print_found("index", indexes)
    print_found("Dynamo beside ours, us and M blocks/s", peers)
    print_json("scheduler", args, decisions=rows, indexes=indexes, dynamo=peers)


def measure_decisions(fleet: ScheduledFleet, num_tokens: int, num_requests: int) -> Found:
    """Microseconds: median and 99th percentile, and the bound."""
    num_blocks = num_tokens // BLOCK_SIZE
    requests = [fleet.request(num_blocks, is_hit=number % 2 == 0) for number in range(num_requests)]
    for request in requests[:50]:
        fleet.decide(request)
    matched, decided, used = zip(*map(fleet.decide, requests), strict=True)
    both = [m + d for m, d in zip(matched, decided, strict=True)]
    found = {
        "match p50": percentile(matched, 50), "decide p50": percentile(decided, 50),
        "both p50": percentile(both, 50), "both p99": percentile(both, 99), "own p99": percentile(used, 99),
        "dispatch p50": percentile([fleet.dispatch(request) for request in requests[: num_requests // 2]], 50),
    }  # fmt: skip
    blocks = fleet.admission.index.blocks
    limit_s = percentile([timed(partial(look_up, blocks, request.block_hashes)) for request in requests[::2]], 50)
    return {name: round(1e6 * seconds, 1) for name, seconds in found.items()} | {
        "limit": round(1e6 * limit_s, 1),
        "of limit": round(limit_s / found["both p50"], 3),
    }


def measure_index(fleet: ScheduledFleet, num_bytes: int) -> Found:
    """Of filling it; the bound is a dictionary of its keys."""
    index = fleet.admission.index
    keys = list(index.blocks)
    plain: dict[bytes, int] = {}
    limit_s = timed(lambda: plain.update(dict.fromkeys(keys, 0)))
    return {
        "M blocks/s": round(fleet.num_stored / fleet.store_s / 1e6, 2),
        "limit M/s": round(len(keys) / limit_s / 1e6, 2),
        "holders a block": round(fleet.num_stored / len(index), 2),
        "bytes a block": round(num_bytes / len(index)),
        "sets": index.num_sets,
    }


def measure_peer(python: Path, fleet: ScheduledFleet, num_replicas: int, num_blocks: int, num_requests: int) -> Found:
    """Ten rounds in turns with ours; prompts of as many blocks as a chain has. Medians of the rounds' medians."""
    peer = PeerProcess("dynamo", (str(python), str(PEER_SCRIPT), str(num_replicas), str(num_blocks), str(CHAIN)))
    try:
        stored_s = peer.ask(["store", 0])
        num_each = max(20, num_requests // 10)
        theirs, ours, selects = [], [], []
        for _ in range(10):
            theirs.append(peer.ask(["find", num_each]))
            requests = [fleet.request(CHAIN, is_hit=True) for _ in range(num_each)]
            ours.append(percentile([sum(fleet.decide(request)[:2]) for request in requests], 50))
            selects.append(peer.ask(["select", num_each]))
    finally:
        peer.close()
    found = {"find p50": theirs, "select of 8 p50": selects, "our match and decide p50": ours}
    rounded = {name: round(1e6 * percentile(values, 50), 1) for name, values in found.items()}
    return rounded | {"M blocks/s": round(num_blocks / stored_s / 1e6, 2)}


def look_up(blocks: Mapping[BlockKey, object], hashes: Sequence[BlockKey]) -> list[object]:
    """What any match has to do at least."""
    return list(map(blocks.get, hashes))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun_at = time.perf_counter()
    work()
    return time.perf_counter() - begun_at


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def print_found(title: str, rows: Sequence[Found]) -> None:
    """One table, unless there is nothing in it."""
    if rows:
        print(f"\n{title}")
        print_table(list(rows[0]), [[f"{value:g}" for value in row.values()] for row in rows])


if __name__ == "__main__":
    main()

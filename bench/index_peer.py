"""Dynamo's KV index and selection service; runs under an interpreter that has them, without this package.

index_peer.py NUM_WORKERS NUM_BLOCKS CHAIN reads lines [what, count] and answers with seconds: "store" of filling the
index with chains of blocks, "find" of the median prompt that is found, "select" of the median choice among 8 workers
(events came over ZMQ, 100,000 blocks at most).
"""

import asyncio
import json
import random
import statistics
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

NUM_SELECTED = 8
SELECT_BLOCKS = 100_000
FIRST_PORT = 29_650
BLOCK_SIZE = 16


class Index:
    """RadixTree, fed with the JSON that its binding takes."""

    def __init__(self, num_workers: int, num_blocks: int, chain: int) -> None:
        from dynamo.llm import RadixTree

        self._tree = RadixTree()
        rng = random.Random(1)
        self._chains = [[rng.getrandbits(63) for _ in range(chain)] for _ in range(num_blocks // chain)]
        self._num_workers = num_workers
        self._rng = rng

    def store(self, _: int) -> float:
        """One event per chain; making the JSON is not counted."""
        events = [
            json.dumps(
                {"event_id": n, "data": {"stored": {"parent_hash": None, "blocks": [
                    {"block_hash": block, "tokens_hash": block} for block in chain]}}}
            ).encode()
            for n, chain in enumerate(self._chains)
        ]  # fmt: skip
        begun_at = time.perf_counter()
        for number, event in enumerate(events):
            self._tree.apply_event(number % self._num_workers, event)
        self._tree.find_matches(self._chains[-1])  # applied in order: it waits for the last one
        return time.perf_counter() - begun_at

    def find(self, count: int) -> float:
        """Median of prompts that are found."""
        return median(lambda: self._tree.find_matches(self._rng.choice(self._chains)), count)


class Selection:
    """The router without its runtime."""

    def __init__(self, num_blocks: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._rng = random.Random(5)
        self._sequences = [
            [self._rng.randrange(32_000) for _ in range(64 * BLOCK_SIZE)]
            for _ in range(min(SELECT_BLOCKS, num_blocks) // 64)
        ]
        self._count = 0
        self._loop.run_until_complete(self._start())

    def select(self, count: int) -> float:
        """Median of prompts that are found."""
        return self._loop.run_until_complete(self._select(count))

    async def _start(self) -> None:
        import msgpack
        import zmq
        from dynamo._core import SelectionService

        context = zmq.Context()
        self._publishers = [context.socket(zmq.PUB) for _ in range(NUM_SELECTED)]
        self._service = SelectionService(indexer_threads=1)
        for number, publisher in enumerate(self._publishers):
            endpoint = f"tcp://127.0.0.1:{FIRST_PORT + number}"
            publisher.setsockopt(zmq.SNDHWM, 0)
            publisher.bind(endpoint)
            worker: dict[str, Any] = {
                "worker_id": number + 1, "model_name": "m", "block_size": BLOCK_SIZE, "data_parallel_size": 1,
                "endpoint": f"http://127.0.0.1:{9200 + number}", "data_parallel_start_rank": 0,
                "total_kv_blocks": 2 * SELECT_BLOCKS, "max_num_batched_tokens": 8192,
                "kv_events_endpoint": endpoint,
            }  # fmt: skip
            answer = await self._service.upsert_worker(worker)
            if answer["lifecycle"] == "incomplete":
                await self._service.upsert_worker(worker | {"kv_events_endpoints": {0: endpoint}})
        await asyncio.sleep(1.5)
        for number, tokens in enumerate(self._sequences):
            hashes = [self._rng.getrandbits(62) for _ in range(64)]
            event: list[Any] = ["BlockStored", hashes, None, tokens, BLOCK_SIZE, None]
            payload = msgpack.packb([time.time(), [event], 0])
            publisher = self._publishers[number % NUM_SELECTED]
            publisher.send_multipart([b"", struct.pack(">q", number // NUM_SELECTED), payload])
        await self._until_heard()

    async def _until_heard(self) -> None:
        """Raises RuntimeError when the last event of a worker does not arrive."""
        for tokens in self._sequences[-NUM_SELECTED:]:
            for _ in range(2000):
                scores = await self._service.overlap_scores({"model_name": "m", "token_ids": tokens})
                if any(worker["device_blocks"] == 64 for worker in scores["workers"]):
                    break
                await asyncio.sleep(0.01)
            else:
                raise RuntimeError("events did not arrive")

    async def _select(self, count: int) -> float:
        seconds = []
        for _ in range(count):
            self._count += 1
            tokens = self._rng.choice(self._sequences)
            request = {"model_name": "m", "token_ids": tokens, "selection_id": f"s{self._count}"}
            begun_at = time.perf_counter()
            await self._service.select(request)
            seconds.append(time.perf_counter() - begun_at)
        return statistics.median(seconds)


def median(work: Callable[[], object], count: int) -> float:
    """Seconds of the median call."""
    seconds = []
    for _ in range(count):
        begun_at = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun_at)
    return statistics.median(seconds)


def main() -> None:
    """Serves orders until standard input ends."""
    num_workers, num_blocks, chain = map(int, sys.argv[1:])
    index, selection = Index(num_workers, num_blocks, chain), Selection(num_blocks)
    answers = {"store": index.store, "find": index.find, "select": selection.select}
    print("BENCH", json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, count = json.loads(line)
        print("BENCH", json.dumps(answers[what](count)), flush=True)


if __name__ == "__main__":
    main()

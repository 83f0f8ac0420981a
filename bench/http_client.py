"""The load of bench.http, in a process of its own: streams that each send one request after another.

Prints one JSON object: see `LoadResult`.
"""

import argparse
import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field

import httpx

TIMEOUT_S = 300.0


@dataclass
class LoadResult:
    """What the client saw; seconds. A frame that brings several tokens counts as that many equal gaps."""

    num_tokens: int = 0
    elapsed_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)


class Load:
    """Greedy streamed completions of random prompts, none like another."""

    def __init__(self, args: argparse.Namespace, client: httpx.AsyncClient) -> None:
        self._args = args
        self._client = client
        self._rng = random.Random(args.seed)
        self.result = LoadResult()

    async def run(self) -> None:
        """All streams to their end. Raises httpx.HTTPStatusError when a request is refused."""
        started = time.perf_counter()
        await asyncio.gather(*(self._stream() for _ in range(self._args.streams)))
        self.result.elapsed_s = time.perf_counter() - started

    async def _stream(self) -> None:
        for _ in range(self._args.rounds):
            await self._request()

    async def _request(self) -> None:
        prompt = [self._rng.randrange(self._args.vocab) for _ in range(self._args.prompt)]
        body = {
            "model": self._args.model, "prompt": prompt, "max_tokens": self._args.output, "temperature": 0,
            "stream": True, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        last, num_tokens = time.perf_counter(), 0
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ConnectionError(event["error"]["message"])
                count = sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
                if count:
                    last = self._count(last, count, is_first=num_tokens == 0)
                    num_tokens += count
        if num_tokens != self._args.output:
            raise ConnectionError(f"{num_tokens} tokens came, {self._args.output} were asked for")

    def _count(self, last: float, count: int, *, is_first: bool) -> float:
        now = time.perf_counter()
        self.result.num_tokens += count
        if is_first:
            self.result.ttft_s.append(now - last)
        else:
            self.result.itl_s += [(now - last) / count] * count
        return now


async def run_load(args: argparse.Namespace) -> LoadResult:
    """One load on one server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=args.url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        load = Load(args, client)
        await load.run()
        return load.result


def main() -> None:
    """Runs one load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vocab", type=int, required=True, help="prompts are drawn from token ids below")
    for name in ("streams", "rounds", "prompt", "output", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(asdict(asyncio.run(run_load(parser.parse_args())))))


if __name__ == "__main__":
    main()

"""Load from beside the bridge: streams that begin anew until told to stop. Prints one JSON line of what happened.

Run by the tests inside the hub's namespace, where the fleet's addresses can be reached:
python -m tests.hosts.client URL API_KEY EXPECTED_JSON NUM_STREAMS STOP_FILE
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import httpx
import openai


async def run_load(url: str, api_key: str, expected: dict[str, list[int]], num: int, stop: Path) -> None:
    """`expected` maps prompts to the greedy tokens of the oracle; every answer is compared."""
    http = httpx.AsyncClient(trust_env=False, timeout=120)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, http_client=http, max_retries=0)
    done: list[float] = []
    errors: list[str] = []
    wrong: list[str] = []
    longest_gap_s = 0.0

    async def stream(i: int) -> None:
        nonlocal longest_gap_s
        prompts = list(expected)
        while not stop.exists():  # noqa: ASYNC240 - a local file, and nothing else here is in a hurry
            prompt = prompts[i % len(prompts)]
            try:
                tokens, last = [], time.monotonic()
                answer = await client.completions.create(
                    model="baton-demo", prompt=prompt, max_tokens=len(expected[prompt]), temperature=0, stream=True,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )  # fmt: skip
                async for chunk in answer:
                    for choice in chunk.choices:
                        tokens += choice.token_ids or []
                    longest_gap_s = max(longest_gap_s, time.monotonic() - last)
                    last = time.monotonic()
            except (openai.OpenAIError, httpx.HTTPError) as error:
                errors.append(f"{time.time():.1f} {error!r}"[:300])
                await asyncio.sleep(0.2)
                continue
            if tokens != expected[prompt]:
                wrong.append(f"{prompt[:30]}: {len(tokens)} tokens")
            done.append(time.time())
            stop.with_suffix(".progress").write_text(str(len(done)))
            i += num

    await asyncio.gather(*(stream(i) for i in range(num)))
    print(json.dumps({"done": len(done), "errors": errors, "wrong": wrong, "longest_gap_s": round(longest_gap_s, 2)}))


if __name__ == "__main__":
    server, key, file, streams, stop_file = sys.argv[1:]
    asyncio.run(run_load(server, key, json.loads(Path(file).read_text()), int(streams), Path(stop_file)))

"""What tests of the running application share: the oracle's tokens, streams over HTTP, checked load, pool states."""

import asyncio
from dataclasses import dataclass

import httpx
import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.scaling import POOL_NAMES
from cluster.settings import DEMO_MODEL_NAME, demo_model_path
from core.messages.fleet import Role

PROMPTS = [
    "It is a truth universally acknowledged",
    "KING RICHARD II:\nMy lord, what news from",
    "I was born in Tokyo, and I went to the country school as a teacher because nothing else",
    "Elizabeth could not but smile as",
    "The sun was setting when we",
    "Shall I compare thee to a summer's day? " * 20 + "And then",
]
NUM_TOKENS = 48


@dataclass
class Oracle:
    """Greedy tokens of transformers in fp32."""

    model: object
    tokenizer: object

    @classmethod
    def load(cls) -> "Oracle":
        model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
        model.generation_config.pad_token_id = 0
        return cls(model, AutoTokenizer.from_pretrained(demo_model_path()))

    def tokens(self, prompt: str, num_tokens: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            temperature=None,
            top_p=None,
        )
        return out[0, ids.shape[1] :].tolist()


def client_of(fleet) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(trust_env=False, timeout=120)
    return openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="none", http_client=http, max_retries=0)


async def stream_tokens(client, prompt: str, num_tokens: int = NUM_TOKENS, **extra) -> list[int]:
    """Token ids of one greedy streamed completion."""
    body = {"ignore_eos": True, "return_token_ids": True} | extra
    stream = await client.completions.create(
        model=DEMO_MODEL_NAME, prompt=prompt, max_tokens=num_tokens, temperature=0, stream=True, extra_body=body
    )
    tokens: list[int] = []
    async for chunk in stream:
        for choice in chunk.choices:
            tokens += choice.token_ids or []
    return tokens


class Load:
    """Streams that begin anew until told to stop; every answer is checked."""

    def __init__(self, client, expected, num_streams: int, prompts: list[str] = PROMPTS) -> None:
        self._client, self._expected, self._prompts = client, expected, prompts
        self._stop = asyncio.Event()
        self.num_done = 0
        self._tasks = [asyncio.create_task(self._run(i)) for i in range(num_streams)]

    async def _run(self, i: int) -> None:
        while not self._stop.is_set():
            which = i % len(self._prompts)
            tokens = await stream_tokens(self._client, self._prompts[which], len(self._expected[which]))
            assert tokens == self._expected[which]
            self.num_done += 1

    def require_health(self) -> None:
        """Raises what a stream has raised."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def until_done(self, count: int) -> None:
        async with asyncio.timeout(120):
            while self.num_done < count:
                self.require_health()
                await asyncio.sleep(0.02)

    async def finish(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)


def pool_states(role: Role) -> dict[str, int]:
    """Replicas of a pool by Serve's state."""
    from ray import serve

    return serve.status().applications["baton-v1"].deployments[POOL_NAMES[role]].replica_states

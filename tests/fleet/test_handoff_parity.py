"""A request's tokens do not depend on where it runs: plain engine, handoff over any channel, local prefill."""

import asyncio
import random

import pytest

from core.config import PoolConfig
from core.sampling import SamplingParams
from kv_transfer.channels.in_process import Hub, InProcessConnector
from kv_transfer.channels.select import make_connectors
from kv_transfer.channels.strict import StrictLine
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import PlainEngine, make_runner
from tests.fleet.in_process_fleet import run, running_fleet

rng = random.Random(21)
PROMPTS = [[rng.randrange(384) for _ in range(int(400 ** rng.random()))] for _ in range(24)]
SAMPLING = [
    SamplingParams(24, temperature=(0.0, 0.8, 1.1)[i % 3], top_p=(1.0, 0.9)[i % 2], top_k=(0, 40)[i // 2 % 2], seed=i)
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def expected(request, tmp_path_factory):
    """(checkpoint, the plain engine's tokens, one request at a time)."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    runner = make_runner(checkpoint)
    outputs = [s.output for s in PlainEngine(runner, max_num_seqs=1).generate(PROMPTS, SAMPLING)]
    runner.close()
    return checkpoint, outputs


def channels(kind: str):
    if kind == "gloo":
        return make_connectors
    hub = Hub(StrictLine) if kind == "strict" else Hub()

    return lambda config, host, pool, path: (InProcessConnector(hub, pool),)


@pytest.mark.parametrize("kind", ["in_process", "strict", "gloo", "local"])
async def test_greedy_and_sampled_tokens_are_the_plain_engines(expected, kind):
    checkpoint, outputs = expected
    pool = PoolConfig(num_blocks=512, max_num_seqs=16, max_num_batched_tokens=96)
    placement = "local" if kind == "local" else "pair"
    connect = channels("in_process" if kind == "local" else kind)
    async with running_fleet(checkpoint, 1, 1, pool=pool, connect=connect) as fleet:
        requests = [
            run(fleet, f"r{i}", *request, placement) for i, request in enumerate(zip(PROMPTS, SAMPLING, strict=True))
        ]
        assert await asyncio.gather(*requests) == outputs
        prefilled = fleet.replicas["p0"].service._context.engine.num_steps
        assert (prefilled > 0) == (placement == "pair")
        await fleet.until_quiet()

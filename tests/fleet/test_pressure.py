"""More requests than the caches hold, and replicas that say no: every request is answered all the same."""

import asyncio

import pytest

from core.config import PoolConfig
from tests.fleet.in_process_fleet import generate, running_fleet
from tests.fleet.test_fleet import random_prompts, reference

SMALL = PoolConfig(num_blocks=40, max_num_seqs=16, max_num_batched_tokens=64)


@pytest.mark.parametrize(("num_decode", "steps_in_flight"), [(1, 1), (2, 1), (1, 2)])
async def test_sixteen_long_outputs_in_a_cache_for_four_all_finish(tiny_llama, num_decode, steps_in_flight):
    path, model = tiny_llama
    pool = SMALL.model_copy(update={"steps_in_flight": steps_in_flight})
    prompts = random_prompts(4, (20,) * 16)
    expected = [reference(model, prompt, 150) for prompt in prompts]
    async with running_fleet(path, 1, num_decode, pool=pool) as fleet:
        requests = [generate(fleet, f"r{i}", prompt, 150) for i, prompt in enumerate(prompts)]
        assert await asyncio.gather(*requests) == expected
        await fleet.until_quiet()


async def test_a_cached_prefix_is_not_counted_as_room(tiny_llama):
    path, model = tiny_llama
    long, short = random_prompts(4, (320, 200))
    prompts = [(long if i % 2 else short) + [i] for i in range(10)]
    expected = [reference(model, prompt, 60) for prompt in prompts]
    async with running_fleet(path, 1, 1, pool=SMALL) as fleet:
        for name, prompt in (("long", long), ("short", short)):
            await generate(fleet, name, prompt, 2)
        requests = [generate(fleet, f"r{i}", prompt, 60) for i, prompt in enumerate(prompts)]
        assert await asyncio.gather(*requests) == expected
        await fleet.until_quiet()


async def test_prefills_that_begin_to_drain_behind_the_schedulers_back_cost_nothing(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(4, (100,))
    expected = reference(model, prompt, 12)
    async with running_fleet(path, 2, 1) as fleet:
        for name in ("p0", "p1"):
            fleet.replicas[name].service.drainer._drain.start(now=0.0, timeout_s=60.0)
        assert await generate(fleet, "r", prompt, 12) == expected
        await fleet.until_quiet()


@pytest.mark.parametrize("num_prompt", [303, 304, 305, 319])
async def test_a_request_may_fill_the_cache_to_its_last_slot(tiny_llama, num_prompt):
    path, model = tiny_llama
    (prompt,) = random_prompts(num_prompt, (num_prompt,))
    expected = reference(model, prompt, 320 - num_prompt)
    pool = PoolConfig(num_blocks=20, max_num_seqs=16, max_num_batched_tokens=64)
    async with running_fleet(path, 1, 1, pool=pool) as fleet, asyncio.timeout(20):
        assert await generate(fleet, "r", prompt, 320 - num_prompt) == expected
        await fleet.until_quiet()

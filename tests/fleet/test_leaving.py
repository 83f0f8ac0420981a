"""Replicas that are told to go while they work: no client notices, and nothing is held when they are drained."""

import asyncio

from core.config import PoolConfig
from tests.fleet.in_process_fleet import FleetHandle, Replica, generate, running_fleet
from tests.fleet.test_fleet import random_prompts, reference


class HeldFetches:
    """Keeps a decode replica from reading announced KV until `go` is set."""

    def __init__(self, decode: Replica) -> None:
        self.go = asyncio.Event()
        self._fetch = decode.service._fetcher.fetch
        decode.service._fetcher.fetch = self._wait_and_fetch

    async def _wait_and_fetch(self, fetch):
        await self.go.wait()
        return await self._fetch(fetch)


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def held_by(fleet: FleetHandle, name: str) -> dict[str, int]:
    return {what: count for what, count in fleet.held().items() if what.startswith(name)}


async def test_a_prefill_waits_until_decode_has_read_the_kv_of_its_last_prompts(tiny_llama):
    path, model = tiny_llama
    prompts = random_prompts(1, (100, 60))
    expected = [reference(model, prompt, 12) for prompt in prompts]
    async with running_fleet(path, 1, 1) as fleet:
        fetches = HeldFetches(fleet.replicas["d0"])
        prefill = fleet.replicas["p0"].service
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 12)) for i, prompt in enumerate(prompts)]
        await until(lambda: len(prefill._deliveries) == 2 and not prefill._answers)
        drain = asyncio.create_task(fleet.replicas["p0"].rank.drain(60.0))
        await until(lambda: prefill.drainer._drain.state == "handing over")
        assert held_by(fleet, "p0")["p0 blocks"] == 7 + 4
        assert not drain.done()
        fetches.go.set()
        async with asyncio.timeout(20):
            await drain
        assert not held_by(fleet, "p0")
        assert await asyncio.gather(*streams) == expected
        await fleet.until_quiet()


async def test_prompts_that_a_prefill_cannot_finish_in_time_are_computed_elsewhere(tiny_llama):
    path, model = tiny_llama
    prompts = random_prompts(2, [200] * 8)
    expected = [reference(model, prompt, 8) for prompt in prompts]
    async with running_fleet(path, 2, 1) as fleet:
        leaving = fleet.replicas["p0"].service
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 8)) for i, prompt in enumerate(prompts)]
        await until(lambda: leaving._answers)
        async with asyncio.timeout(20):
            await fleet.replicas["p0"].rank.drain(0.0)
        assert not held_by(fleet, "p0")
        num_steps = leaving._context.engine.num_steps
        assert await asyncio.gather(*streams) == expected
        assert leaving._context.engine.num_steps <= num_steps + 1, "after the step in flight it computes nothing"
        await fleet.until_quiet()


async def test_a_decode_without_time_hands_requests_over_in_every_phase(tiny_llama):
    """Some wait for prefill, some for KV, some run; nothing is left on either side."""
    path, model = tiny_llama
    prompts = random_prompts(3, [30, 200] * 6)
    expected = [reference(model, prompt, 40) for prompt in prompts]
    pool = PoolConfig(num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64)
    async with running_fleet(path, 1, 2, pool=pool) as fleet:
        leaving = fleet.replicas["d0"].service
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 40)) for i, prompt in enumerate(prompts)]
        await until(lambda: leaving._scheduler.running and len(leaving._handoffs) > len(leaving._scheduler.running))
        async with asyncio.timeout(20):
            await fleet.replicas["d0"].rank.drain(0.0)
        assert leaving.status().draining and not held_by(fleet, "d0")
        assert await asyncio.gather(*streams) == expected
        assert not held_by(fleet, "d0"), "a draining replica got work"
        await fleet.until_quiet()


async def test_a_decode_with_time_finishes_what_it_has(tiny_llama):
    path, model = tiny_llama
    prompts = random_prompts(4, [30] * 3)
    expected = [reference(model, prompt, 40) for prompt in prompts]
    async with running_fleet(path, 1, 1) as fleet:
        leaving = fleet.replicas["d0"].service
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 40)) for i, prompt in enumerate(prompts)]
        await until(lambda: len(leaving._scheduler.running) == 3)
        async with asyncio.timeout(20):
            await fleet.replicas["d0"].rank.drain(60.0)
        assert not held_by(fleet, "d0")
        assert await asyncio.gather(*streams) == expected, "there is no other replica to resume on"

"""Prefixes that lost their place on the device come back from host memory and disk, with the same tokens.

Without prefill replicas, decode prefills everything by itself.
"""

import asyncio

import pytest

from core.block_hash import hash_blocks
from core.config import PoolConfig, TiersConfig
from core.errors import TransferFailed
from engine.checkpoint import load_model_spec
from tests.checkpoints import make_checkpoint
from tests.fleet.in_process_fleet import BLOCK_SIZE, generate, running_fleet
from tests.fleet.test_fleet import reference

NUM_PROMPT = 6 * BLOCK_SIZE + 1
PROMPTS = [[(7 * n + 3 * i) % 250 for i in range(NUM_PROMPT)] for n in range(4)]


def a_pool(tiers: TiersConfig) -> PoolConfig:
    """Room for one prompt and its answer, not for two."""
    return PoolConfig(num_blocks=10, max_num_seqs=1, max_num_batched_tokens=64, tiers=tiers)


def block_mib(checkpoint) -> float:
    return load_model_spec(checkpoint, "float32", None).kv_layout(1, BLOCK_SIZE).block_bytes_per_rank / 2**20


async def tiers_at_rest(replica):
    """What a replica has below its device once everything released is there."""
    async with asyncio.timeout(10):
        while replica.pool._released:
            await asyncio.sleep(0.01)
        while replica.service._context.tiers.books._spilling is not None:
            await asyncio.sleep(0.01)
    return {status.name: status for status in replica.service.status().tiers}


@pytest.mark.parametrize("num_host_blocks", [100, 8])
async def test_a_prefix_comes_back_from_host_memory_and_disk(tiny_llama, tmp_path, num_host_blocks):
    size = block_mib(tiny_llama[0])
    tiers = TiersConfig(host_mib=num_host_blocks * size, disk_mib=100 * size, disk_dir=str(tmp_path))
    async with running_fleet(tiny_llama[0], 0, 1, a_pool(tiers)) as fleet:
        decode = fleet.replicas["d0"]
        first = [await generate(fleet, f"a{n}", prompt, 4) for n, prompt in enumerate(PROMPTS)]
        before = await tiers_at_rest(decode)
        again = [await generate(fleet, f"b{n}", prompt, 4) for n, prompt in enumerate(PROMPTS)]
        after = await tiers_at_rest(decode)
        await fleet.until_quiet()
    assert first == [reference(tiny_llama[1], prompt, 4) for prompt in PROMPTS]
    assert again == first
    assert before["host"].num_cached + before["disk"].num_cached >= 4 * 6
    found = {name: after[name].num_found - before[name].num_found for name in after}
    assert sum(found.values()) == 4 * 6  # every full block of every prompt
    assert found["host"] + found["disk"] >= 3 * 6
    assert (found["disk"] > 0) == (num_host_blocks == 8)
    assert after["device"].bytes_in == (after["host"].num_found + after["disk"].num_found) * int(size * 2**20)


async def test_without_tiers_the_prompt_is_computed_again(tiny_llama):
    async with running_fleet(tiny_llama[0], 0, 1, a_pool(TiersConfig())) as fleet:
        for n, prompt in enumerate([*PROMPTS, *PROMPTS]):
            await generate(fleet, f"a{n}", prompt, 4)
        (device,) = fleet.replicas["d0"].service.status().tiers
    assert device.name == "device"
    assert device.num_wanted == 8 * 6
    assert device.num_found == 0


async def test_the_scheduler_knows_what_lies_below_the_device(tiny_llama):
    """Routed hits are the engine's hits, though the device has forgotten them."""
    tiers = TiersConfig(host_mib=100 * block_mib(tiny_llama[0]))
    async with running_fleet(tiny_llama[0], 0, 1, a_pool(tiers)) as fleet:
        for n, prompt in enumerate(PROMPTS):
            await generate(fleet, f"a{n}", prompt, 4)
        replica = fleet.replicas["d0"]
        await tiers_at_rest(replica)
        held = {*replica.pool.snapshot(), *replica.service._context.tiers.books.snapshot()}
        index = fleet.scheduler._admission.index
        async with asyncio.timeout(10):
            while index.held_by("d0") != held:
                await asyncio.sleep(0.02)
        assert [index.match(hash_blocks(prompt, BLOCK_SIZE)) for prompt in PROMPTS] == [{"d0": 6}] * 4
        assert replica.pool.num_cached < 4 * 6 <= len(held)
        chains = [hash_blocks(prompt, BLOCK_SIZE)[:6] for prompt in PROMPTS]
        below = [sum(key not in replica.pool for key in chain) for chain in chains]
        assert sum(below) >= 4 * 6 - 10, "the device has ten blocks"
        async with asyncio.timeout(10):
            while below != [index.match(chain).num_below("d0", 6, (None,)).get(1, 0) for chain in chains]:
                await asyncio.sleep(0.02)


async def test_a_tier_that_fails_costs_a_computation_and_no_request(tiny_llama):
    tiers = TiersConfig(host_mib=100 * block_mib(tiny_llama[0]))
    async with running_fleet(tiny_llama[0], 0, 1, a_pool(tiers)) as fleet:
        decode = fleet.replicas["d0"]
        first = [await generate(fleet, f"a{n}", prompt, 4) for n, prompt in enumerate(PROMPTS[:2])]
        await tiers_at_rest(decode)

        async def fails(_):
            raise TransferFailed("broken memory")

        decode.service._context.tiers._make_move = fails
        again = [await generate(fleet, f"b{n}", prompt, 4) for n, prompt in enumerate(PROMPTS[:2])]
        await fleet.until_quiet()
    assert again == first


async def test_a_prefix_comes_back_for_a_model_with_windows(tmp_path):
    """Of layers with a window only the blocks that the rest of the prompt sees."""
    checkpoint = make_checkpoint(tmp_path, "gemma2")
    prompts = [[(5 * n + 3 * i) % 384 for i in range(NUM_PROMPT + 64)] for n in range(3)]
    pool = PoolConfig(num_blocks=26, max_num_seqs=1, max_num_batched_tokens=32, tiers=TiersConfig(host_mib=4))
    async with running_fleet(checkpoint, 0, 1, pool) as fleet:
        decode = fleet.replicas["d0"]
        first = [await generate(fleet, f"a{n}", prompt, 4) for n, prompt in enumerate(prompts)]
        before = await tiers_at_rest(decode)
        again = [await generate(fleet, f"b{n}", prompt, 4) for n, prompt in enumerate(prompts)]
        after = await tiers_at_rest(decode)
        await fleet.until_quiet()
    assert again == first
    num_found = after["host"].num_found - before["host"].num_found
    assert 2 * 10 <= num_found < 3 * 2 * 10  # ten blocks of each prompt in the group that sees all, fewer in the other

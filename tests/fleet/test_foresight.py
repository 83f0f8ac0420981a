"""What real replicas report is what the scheduler learns from: costs, hits, lengths, its own errors."""

import asyncio

from cluster.ingress.fleet_metrics import fleet_exposition
from core.block_hash import hash_blocks
from core.config import PoolConfig
from core.messages.fleet import Empty
from tests.fleet.in_process_fleet import generate, running_fleet
from tests.fleet.test_fleet import random_prompts

NUM_OUTPUT = 24


async def test_predictions_hits_and_lengths_are_learned_from_what_ran(tiny_llama):
    prompts = random_prompts(11, (70, 90, 110))
    pool = PoolConfig(num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64)
    async with running_fleet(tiny_llama[0], 1, 1, pool) as fleet:
        admission = fleet.scheduler._admission
        learned = admission.policy.learned
        for number, prompt in enumerate(prompts):
            await generate(fleet, f"cold{number}", prompt, NUM_OUTPUT)
        async with asyncio.timeout(10):
            while len(admission.index.held_by("p0")) < sum(len(prompt) // 16 for prompt in prompts):
                await asyncio.sleep(0.02)
        for number, prompt in enumerate(prompts):
            await generate(fleet, f"warm{number}", prompt, NUM_OUTPUT)
        async with asyncio.timeout(10):
            while len(admission.reservations):
                await asyncio.sleep(0.02)
        foresight = admission.policy.foresight()
        ttft, itl = foresight.errors
        assert (ttft.quantity, ttft.num_samples) == ("ttft", 6)
        assert itl.num_samples > 8
        assert (foresight.num_hits_checked, foresight.num_hits_missed) == (3, 0)
        assert learned.lengths.of("", "", 10_000) < 256 * 4 / 10 + NUM_OUTPUT + 1, "six answers, and the first guess"
        prefill, decode = (admission.fleet.get(name) for name in ("p0", "d0"))
        assert prefill.info.flop_per_s > 0 and prefill.info.num_active_parameters > 0
        assert learned.costs._class_of(prefill.info).chunks.fit.num_samples >= 6
        assert learned.costs._class_of(decode.info).decodes.fit.num_samples > 8
        assert 0 < learned.links.cost(prefill, decode).byte_s < 1e-3
        assert learned.links._known.cost("p0", "d0") is not None
        metrics = fleet_exposition(await fleet.scheduler.fleet(Empty())).decode()
    assert 'baton_predictions{quantity="ttft"} 6.0' in metrics
    assert 'baton_prediction_relative_error{quantile="0.95",quantity="itl"}' in metrics
    assert 'baton_routed_hits{outcome="found"} 3.0' in metrics
    assert 'baton_routed_hits{outcome="missed"} 0.0' in metrics


async def test_a_hit_that_the_engine_lost_is_told(tiny_llama):
    """The scheduler is told of blocks that prefill does not have."""
    (prompt,) = random_prompts(12, (100,))
    async with running_fleet(tiny_llama[0], 1, 1) as fleet:
        admission = fleet.scheduler._admission
        admission.index.store("p0", hash_blocks(prompt, 16))
        await generate(fleet, "r", prompt, 4)
        async with asyncio.timeout(10):
            while len(admission.reservations):
                await asyncio.sleep(0.02)
        foresight = admission.policy.foresight()
    assert (foresight.num_hits_checked, foresight.num_hits_missed, foresight.num_tokens_missed) == (1, 1, 96)

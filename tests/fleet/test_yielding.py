"""Batch work on a full decode replica makes room for a person's request, and still says what it would have said."""

import asyncio
import random

from cluster.ingress.generation import Generation, Standing
from core.config import PoolConfig, SchedulerConfig
from core.sampling import SamplingParams
from tests.fleet.in_process_fleet import running_fleet
from tests.fleet.test_fleet import reference


async def generated(fleet, name: str, prompt, num_tokens: int, slo_class: str) -> tuple[list[int], int]:
    """All output tokens, and how often the request was planned anew."""
    params, standing = SamplingParams(num_tokens, temperature=0.0), Standing("", slo_class)
    tokens, num_resumes = [], 0
    async for event in fleet.orchestrator.generate(Generation(name, tuple(prompt), params, 60.0, "auto", standing)):
        tokens += event.token_ids
        num_resumes = event.num_resumes
    return tokens, num_resumes


async def test_batch_work_yields_at_once_and_goes_on_where_it_was(tiny_llama):
    path, model = tiny_llama
    rng = random.Random(7)
    prompts = [[rng.randrange(256) for _ in range(40)] for _ in range(3)]
    pool = PoolConfig(num_blocks=64, max_num_seqs=2, max_num_batched_tokens=64)
    scheduler = SchedulerConfig(max_batch_kv_usage=1.0, itl_slo_s=5.0)
    async with running_fleet(path, pool=pool, scheduler=scheduler) as fleet:
        batch = [asyncio.create_task(generated(fleet, f"b{i}", prompts[i], 200, "batch")) for i in range(2)]
        decode = fleet.replicas["d0"].service
        async with asyncio.timeout(20):
            while len(decode._scheduler.running) < 2:
                await asyncio.sleep(0.005)
        person, num_resumes = await generated(fleet, "person", prompts[2], 8, "interactive")
        assert person == reference(model, prompts[2], 8) and num_resumes == 0
        assert not all(task.done() for task in batch)
        answers = await asyncio.gather(*batch)
        for prompt, (tokens, _) in zip(prompts, answers, strict=False):
            assert tokens == reference(model, prompt, 200)
        assert sum(resumes for _, resumes in answers) >= 1
        (person_why,) = (await fleet.orchestrator.why("person")).decisions
        assert person_why.actual_output_tokens == 8 and person_why.actual_itl_s is not None
        assert (person_why.actual_handoff_s is not None) == bool(person_why.candidates[0].prefill_id)
        of_batch = [one for i in range(2) for one in (await fleet.orchestrator.why(f"b{i}")).decisions]
        assert len(of_batch) == 2 + sum(resumes for _, resumes in answers)
        whole = [one for one in of_batch if one.actual_output_tokens is not None]
        assert len(whole) == 2 and all(one.actual_itl_s is not None for one in whole)
        await fleet.until_quiet()

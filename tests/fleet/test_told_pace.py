"""What came of a pair's prediction is told in its parts: a handoff that takes long makes no token of decode slower."""

import asyncio
import time

from cluster.ingress.generation import Generation
from core.sampling import SamplingParams
from rpc.methods import COMMIT
from tests.fleet.faults import Gate, meddle_with_all_calls
from tests.fleet.in_process_fleet import running_fleet

NUM_TOKENS = 6
HELD_S = 0.4


async def test_a_handoff_that_is_held_up_is_no_part_of_the_itl(tiny_llama, monkeypatch):
    path, _ = tiny_llama
    gate = Gate(COMMIT.name)
    meddle_with_all_calls(monkeypatch, gate)
    async with running_fleet(path) as fleet:
        asked = Generation("held", tuple(range(40)), SamplingParams(NUM_TOKENS, temperature=0.0), 60.0, "pair")
        tokens: list[int] = []
        first_at = opened_at = 0.0
        async for event in fleet.orchestrator.generate(asked):
            tokens += event.token_ids
            if len(tokens) == 1:
                first_at = time.monotonic()
                await asyncio.sleep(HELD_S)  # decode has not been told that all of the prompt's KV is there
                opened_at = time.monotonic()
                gate.opened.set()
        ended_at = time.monotonic()
        await fleet.until_quiet()
        (why,) = (await fleet.orchestrator.why("held")).decisions
        assert len(tokens) == why.actual_output_tokens == NUM_TOKENS and why.candidates[0].prefill_id == "p0"
        assert why.actual_handoff_s >= opened_at - first_at >= HELD_S
        assert 0 < why.actual_itl_s * (NUM_TOKENS - 2) <= ended_at - opened_at  # all after decode's first token

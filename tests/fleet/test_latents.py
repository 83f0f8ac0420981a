"""Latents of DeepSeek go from prefill to decode as keys and values do: tokens of a lone engine, one plane of bytes."""

import random

import pytest

from cluster.ingress.generation import Generation
from core.config import TransferConfig
from core.sampling import SamplingParams
from tests.checkpoints import LATENTS, SHARED, make_checkpoint
from tests.engine.plain_engine import BLOCK_SIZE, PlainEngine, greedy, make_runner
from tests.fleet.in_process_fleet import running_fleet

LENGTHS = (1, 15, 16, 17, 100, 250)
PROMPTS = [[random.Random(length).randrange(384) for _ in range(length)] for length in LENGTHS]
TOKEN_BYTES = SHARED["num_hidden_layers"] * (LATENTS["kv_lora_rank"] + LATENTS["qk_rope_head_dim"]) * 4


@pytest.mark.parametrize("channel", ["shared_memory", "tcp"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
async def test_tokens_after_a_handoff_are_those_of_a_lone_engine(tmp_path, family, channel):
    checkpoint = make_checkpoint(tmp_path, family)
    runner = make_runner(checkpoint)
    expected = [s.output for s in PlainEngine(runner, max_num_seqs=1).generate(PROMPTS, [greedy(16)] * len(PROMPTS))]
    runner.close()
    transfer = TransferConfig(channel=channel, layers_per_group=1, slab_mib=0.01, digest_share=1.0)
    async with running_fleet(checkpoint, transfer=transfer) as fleet:
        for i, (prompt, tokens) in enumerate(zip(PROMPTS, expected, strict=True)):
            generation, got = Generation(f"r{i}", tuple(prompt), SamplingParams(16, temperature=0.0), 60, "pair"), []
            async for event in fleet.orchestrator.generate(generation):
                got += event.token_ids
                if event.phases:
                    assert event.phases.num_blocks_received == -(-len(prompt) // BLOCK_SIZE)
                    assert event.phases.transfer_bytes == event.phases.num_blocks_received * BLOCK_SIZE * TOKEN_BYTES
            assert got == tokens, len(prompt)
        assert fleet.replicas["p0"].service._context.engine.num_steps > 0
        await fleet.until_quiet()

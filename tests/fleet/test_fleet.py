"""A whole fleet in one process: tokens against transformers, and nothing held whatever clients and replicas do."""

import asyncio
import random
from contextlib import aclosing, suppress

import pytest
import torch

from cluster.ingress.generation import Generation
from core.config import PoolConfig, TransferConfig
from core.errors import NoReplica, PeerLost, PromptTooLong
from core.messages.fleet import Role
from core.sampling import SamplingParams
from core.version import PROTOCOL
from tests.fleet.faults import meddle_with_all_calls
from tests.fleet.in_process_fleet import generate, running_fleet


def reference(model, prompt, max_tokens) -> list[int]:
    """Greedy tokens of transformers."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def random_prompts(seed: int, lengths) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


async def test_greedy_tokens_after_a_handoff_are_those_of_transformers(tiny_llama):
    path, model = tiny_llama
    async with running_fleet(path) as fleet:
        for i, prompt in enumerate(random_prompts(1, (1, 15, 16, 17, 33, 100, 250))):
            assert await generate(fleet, f"r{i}", prompt, 12) == reference(model, prompt, 12), len(prompt)
        await fleet.until_quiet()


async def test_the_whole_prompt_may_be_cached_on_decode_already(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(2, (64,))
    async with running_fleet(path) as fleet:
        expected = reference(model, prompt, 8)
        for i in range(3):
            assert await generate(fleet, f"r{i}", prompt, 8) == expected
        await fleet.until_quiet()


async def test_only_blocks_that_decode_lacks_travel(tiny_llama):
    path, _ = tiny_llama
    shared, one, other = random_prompts(3, (64, 16, 16))
    async with running_fleet(path) as fleet:
        reports = []
        for i, prompt in enumerate((shared + one, shared + other)):
            generation = Generation(f"r{i}", tuple(prompt), SamplingParams(4, temperature=0.0), 30)
            async for event in fleet.orchestrator.generate(generation):
                reports += [event.phases] if event.phases else []
        first, second = reports
        assert (first.num_blocks_received, first.num_blocks_reused) == (5, 0)
        assert (second.num_blocks_received, second.num_blocks_reused) == (1, 4)
        assert second.transfer_bytes * 5 == first.transfer_bytes


async def test_local_prefill_on_decode_gives_the_same_tokens(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(4, (100,))
    async with running_fleet(path, num_prefill=0) as fleet:
        assert await generate(fleet, "r", prompt, 12) == reference(model, prompt, 12)
        await fleet.until_quiet()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
async def test_32_streams_with_disconnects_at_every_phase_leave_nothing(tiny_llama, steps_in_flight):
    path, model = tiny_llama
    pool = PoolConfig(num_blocks=128, max_num_seqs=8, max_num_batched_tokens=64, steps_in_flight=steps_in_flight)
    rng = random.Random(5)
    prompts = random_prompts(6, [rng.randint(1, 200) for _ in range(32)])
    expected = [reference(model, prompt, 24) for prompt in prompts]
    async with running_fleet(path, 2, 2, pool) as fleet:

        async def client(i: int) -> bool:
            generation = Generation(f"r{i}", tuple(prompts[i]), SamplingParams(24, temperature=0.0), 60)
            leave_after_tokens = rng.choice([None, 0, 1, 2, 5, 20])
            leave_after_s = rng.choice([None, None, 0.0, 0.005, 0.02, 0.05, 0.1, 0.3])
            tokens: list[int] = []

            async def read() -> None:
                async with aclosing(fleet.orchestrator.generate(generation)) as events:
                    async for event in events:
                        tokens.extend(event.token_ids)
                        if leave_after_tokens is not None and len(tokens) >= leave_after_tokens:
                            return

            with suppress(TimeoutError):
                await asyncio.wait_for(read(), leave_after_s)
            assert tokens == expected[i][: len(tokens)]
            return len(tokens) == 24

        finished = await asyncio.gather(*(client(i) for i in range(32)))
        assert 0 < sum(finished) < 32
        await fleet.until_quiet()


async def test_a_decode_that_dies_mid_stream_costs_a_pause_and_no_token(tiny_llama):
    """Greedy and sampled: what follows is what would have followed."""
    path, _ = tiny_llama
    prompts = random_prompts(7, [40] * 6)
    async with running_fleet(path, 1, 2) as fleet:
        killed = asyncio.Event()

        async def client(name: str, i: int, kill: bool) -> list[int]:
            params = SamplingParams(40, temperature=0.9 * (i % 2), seed=i)
            tokens: list[int] = []
            async for event in fleet.orchestrator.generate(Generation(f"{name}{i}", tuple(prompts[i]), params, 60)):
                tokens += event.token_ids
                if kill and len(tokens) == 10 and not killed.is_set():
                    killed.set()
                    await fleet.stop("d0")
            return tokens

        undisturbed = await asyncio.gather(*(client("a", i, False) for i in range(6)))
        disturbed = await asyncio.gather(*(client("b", i, True) for i in range(6)))
        assert killed.is_set() and disturbed == undisturbed
        await fleet.until_quiet()


async def test_a_long_stream_outlives_more_replicas_than_a_request_may_try_in_a_row(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(8, (40,))
    params = SamplingParams(48, temperature=0.0)
    async with running_fleet(path, 1, 1) as fleet:
        tokens: list[int] = []
        num_deaths = 0
        async for event in fleet.orchestrator.generate(Generation("long", tuple(prompt), params, 60)):
            tokens += event.token_ids
            if len(tokens) >= 6 * (num_deaths + 1) and num_deaths < 6:
                num_deaths += 1
                await fleet.add(f"d{num_deaths}", Role.DECODE)
                await fleet.stop(f"d{num_deaths - 1}")
        assert num_deaths == 6
        assert tokens == reference(model, prompt, 48)
        await fleet.until_quiet()


async def test_a_resumed_local_request_counts_its_cache_once_and_ends_its_prefill_reservation(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(9, (64,))
    async with running_fleet(path, 0, 2) as fleet:
        generation = Generation("r", tuple(prompt), SamplingParams(60, temperature=0.0), 60)
        tokens, cached = [], []
        async with aclosing(fleet.orchestrator.generate(generation)) as events:
            async for event in events:
                tokens += event.token_ids
                cached += [event.num_cached_tokens] if event.num_cached_tokens is not None else []
                if len(tokens) == 10:
                    (busy,) = [name for name, replica in fleet.replicas.items() if replica.pool.num_held]
                    await fleet.stop(busy)
                if event.num_resumes:
                    async with asyncio.timeout(10):
                        while any(view.prefill_tokens for view in fleet.scheduler._admission.fleet):
                            await asyncio.sleep(0.01)
        assert tokens == reference(model, prompt, 60)
        assert cached == [0]
        await fleet.until_quiet()


async def test_a_prefill_that_dies_is_replaced_by_another(tiny_llama):
    path, model = tiny_llama
    prompts = random_prompts(8, [200] * 8)
    expected = [reference(model, prompt, 8) for prompt in prompts]
    async with running_fleet(path, 2, 1) as fleet:
        clients = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 8)) for i, prompt in enumerate(prompts)]
        while not len(fleet.replicas["p0"].service._deliveries):
            await asyncio.sleep(0.001)
        await fleet.stop("p0")
        assert await asyncio.gather(*clients) == expected
        await fleet.until_quiet()


async def test_a_full_decode_preempts_the_newest_and_all_finish(tiny_llama):
    path, model = tiny_llama
    prompts = random_prompts(10, [60] * 4)
    expected = [reference(model, prompt, 60) for prompt in prompts]
    pool = PoolConfig(num_blocks=20, max_num_seqs=8, max_num_batched_tokens=64)
    async with running_fleet(path, 1, 1, pool=pool) as fleet:
        clients = [generate(fleet, f"r{i}", prompt, 60) for i, prompt in enumerate(prompts)]
        assert await asyncio.gather(*clients) == expected
        await fleet.until_quiet()


@pytest.mark.parametrize("method", ["Announce", "Commit"])
@pytest.mark.parametrize("arrives", [False, True])
async def test_a_message_to_decode_that_is_lost_or_goes_unanswered_is_sent_again(
    tiny_llama, monkeypatch, method, arrives
):
    path, model = tiny_llama
    (prompt,) = random_prompts(12, (70,))
    lost = []

    async def meddle(name, call):
        if name != method or lost:
            return await call()
        lost.append(name)
        if arrives:
            await call()
        raise PeerLost("lost on the way")

    meddle_with_all_calls(monkeypatch, meddle)
    async with running_fleet(path) as fleet:
        tokens, num_resumes = [], 0
        generation = Generation("r", tuple(prompt), SamplingParams(8, temperature=0.0), 30)
        async for event in fleet.orchestrator.generate(generation):
            tokens += event.token_ids
            num_resumes = event.num_resumes
        assert (tokens, num_resumes, lost) == (reference(model, prompt, 8), 0, [method])
        await fleet.until_quiet()


async def test_without_any_decode_the_request_is_refused(tiny_llama):
    path, _ = tiny_llama
    async with running_fleet(path, 1, 0) as fleet:
        with pytest.raises(NoReplica):
            await generate(fleet, "r", [1, 2, 3], 4)


async def test_a_prompt_that_no_cache_can_hold_is_refused_and_nothing_leaks(tiny_llama):
    path, _ = tiny_llama
    pool = PoolConfig(num_blocks=4, max_num_seqs=8, max_num_batched_tokens=64)
    async with running_fleet(path, 1, 1, pool=pool) as fleet:
        with pytest.raises(PromptTooLong):
            await generate(fleet, "r", [1] * 100, 4)
        await fleet.until_quiet()


async def test_the_scheduler_may_be_away(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(11, (50,))
    async with running_fleet(path, 1, 1, transfer=TransferConfig(layers_per_group=2)) as fleet:
        async with asyncio.timeout(10):
            while fleet.scheduler_client.health().degraded or not fleet.scheduler_client.health().ready:
                await asyncio.sleep(0.01)
        await fleet.scheduler._server.stop()
        assert await generate(fleet, "during", prompt, 8) == reference(model, prompt, 8)


async def test_a_first_token_that_ends_the_request_leaves_nothing_on_decode(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(12, (50,))
    async with running_fleet(path) as fleet:
        first = reference(model, prompt, 1)
        assert await generate(fleet, "length", prompt, 1) == first
        assert await generate(fleet, "stop", prompt, 9, stop_token_ids=frozenset(first)) == first
        await fleet.until_quiet()
        assert fleet.replicas["d0"].info.role is Role.DECODE
        assert fleet.replicas["d0"].service._context.engine.num_steps == 0


async def test_the_scheduler_shows_which_protocol_every_replica_speaks(tiny_llama):
    async with running_fleet(tiny_llama[0]) as fleet:
        status = await fleet.scheduler_client.fleet()
        assert [replica.info.protocol for replica in status.replicas] == [PROTOCOL] * len(fleet.replicas)

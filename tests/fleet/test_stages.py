"""Replicas whose ranks are stages of a pipeline, in fleets: whole handoffs, chunks in flight, pulls, tiers, deaths."""

import asyncio
import random
import threading

import pytest

from bench.rank_processes import RankProcess, rank_processes
from core.config import PoolConfig, SchedulerConfig, TiersConfig, TransferConfig
from core.messages.fleet import Empty, Role
from core.messages.to_rank import SlabHeader, Span
from core.sampling import SamplingParams
from core.security import UNGUARDED
from rpc.client import RpcClient
from rpc.methods import HEALTH
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import PlainEngine, make_runner
from tests.fleet.in_process_fleet import generate, run, running_fleet
from tests.fleet.oracle import are_greedy
from tests.fleet.test_fleet import random_prompts, reference
from tests.fleet.test_processes import specs_of
from tests.fleet.test_pulls import cached_tokens, steer
from tests.fleet.test_tiers import tiers_at_rest

ONE, TWO_STAGES, TWO_RANKS = {}, {"pipeline_parallel": 2, "steps_in_flight": 2}, {"tensor_parallel": 2}
FOUR = {"tensor_parallel": 2} | TWO_STAGES
SETTINGS = [
    (TWO_STAGES, ONE, "shared_memory", "llama"),
    (TWO_STAGES, TWO_RANKS, "tcp", "qwen2"),
    (TWO_STAGES, ONE, "tcp", "gemma3"),
    (TWO_STAGES, TWO_RANKS, "shared_memory", "deepseek_v3"),
    (TWO_STAGES, TWO_STAGES, "shared_memory", "gpt_oss"),
    (TWO_RANKS, TWO_STAGES, "tcp", "mistral"),
    (ONE, TWO_STAGES, "gloo", "qwen3_moe"),
    (ONE, FOUR, "shared_memory", "deepseek_v2"),
    (FOUR, ONE, "tcp", "gemma2"),
]
PROMPTS = [[random.Random(n).randrange(384) for _ in range(n)] for n in (5, 16, 33, 100, 230, 400)]
SAMPLING = [SamplingParams(16, temperature=(0.0, 0.9)[i % 2], top_p=0.95, seed=i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize(("prefill", "decode", "channel", "family"), SETTINGS)
async def test_tokens_do_not_depend_on_stages(tmp_path, prefill, decode, channel, family):
    """Greedy and sampled, against the plain engine on one rank, which test_parity compares with transformers."""
    path = make_checkpoint(tmp_path / "model", family)
    runner = make_runner(path)
    expected = [s.output for s in PlainEngine(runner, max_num_seqs=1).generate(PROMPTS, SAMPLING)]
    runner.close()
    pool = PoolConfig(num_blocks=192, max_num_seqs=8, max_num_batched_tokens=64)
    transfer = TransferConfig(channel=channel, layers_per_group=1, slab_mib=0.01, digest_share=1.0)
    async with running_fleet(path, 0, 0, pool, transfer) as fleet:
        await fleet.add("p0", Role.PREFILL, **prefill)
        await fleet.add("d0", Role.DECODE, **decode)
        await fleet.until_ready(2)
        requests = [
            run(fleet, f"r{i}", *request, "pair") for i, request in enumerate(zip(PROMPTS, SAMPLING, strict=True))
        ]
        assert await asyncio.gather(*requests) == expected
        assert fleet.replicas["p0"].service._context.engine.num_steps > 0
        await fleet.until_quiet()


async def test_prefill_of_two_stages_and_decode_of_one_say_what_transformers_says(tiny_llama):
    path, model = tiny_llama
    prompts = random_prompts(7, (3, 64, 150, 300))
    async with running_fleet(path, 0, 1) as fleet:
        await fleet.add("p0", Role.PREFILL, **TWO_STAGES)
        await fleet.until_ready(2)
        outputs = await asyncio.gather(*(generate(fleet, f"r{i}", p, 24) for i, p in enumerate(prompts)))
        assert outputs == [reference(model, prompt, 24) for prompt in prompts]
        engine = fleet.replicas["p0"].service._context.engine
        assert engine.num_steps >= 517 // 64
        await fleet.until_quiet()


async def test_chunks_and_decode_steps_follow_each_other_through_the_stages(tiny_llama, monkeypatch):
    """As many steps in flight as there are stages; of those that decode, each has a part of the sequences."""
    path, model = tiny_llama
    prompts = random_prompts(8, (300, 300, 40, 40))
    async with running_fleet(path, 0, 0) as fleet:
        most: dict[str, int] = {}
        sizes: list[int] = []
        for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
            replica = await fleet.add(name, role, **TWO_STAGES)
            engine, execute = replica.service._context.engine, replica.service._context.engine.execute
            in_flight = [0]

            async def counted(batch, on_layers, name=name, execute=execute, in_flight=in_flight):
                in_flight[0] += 1
                most[name] = max(most.get(name, 0), in_flight[0])
                if name == "d0":
                    sizes.append(len(batch.sequences))
                try:
                    return await execute(batch, on_layers)
                finally:
                    in_flight[0] -= 1

            monkeypatch.setattr(engine, "execute", counted)
        await fleet.until_ready(2)
        outputs = await asyncio.gather(*(generate(fleet, f"r{i}", p, 40) for i, p in enumerate(prompts)))
        assert outputs == [reference(model, prompt, 40) for prompt in prompts]
        assert most == {"p0": 2, "d0": 2}
        assert max(sizes) == 2, "half of four sequences at a time"
        await fleet.until_quiet()


async def test_a_stage_gives_no_places_but_those_of_its_layers(tiny_llama):
    """Three layers: places 0 and 1 of the first stage, place 0 of the second, whose pool has room for one more."""
    async with running_fleet(tiny_llama[0], 0, 0) as fleet:
        replica = await fleet.add("d0", Role.DECODE, **TWO_STAGES)
        (last,) = replica.others
        assert last._serving.agent._pool.shape[0] == 2

        def may_read(first: int, number: int, group: int = 0) -> bool:
            return last._may_read(SlabHeader(0, "r", 0, Span(first, number, (0,), 0, 1), group=group))

        assert may_read(0, 1)
        assert not (may_read(0, 2) or may_read(1, 1) or may_read(0, 1, group=1) or may_read(0, 1, group=-1))


async def test_layers_of_the_first_stage_arrive_while_the_second_computes(tiny_llama, monkeypatch):
    path, model = tiny_llama
    (prompt,) = random_prompts(9, (60,))
    async with running_fleet(path, 0, 1) as fleet:
        prefill = await fleet.add("p0", Role.PREFILL, **TWO_STAGES)
        await fleet.until_ready(2)
        second, may_compute = prefill.others[0]._serving.engine.runner, threading.Event()
        execute = second.execute_launched

        def held(orders) -> None:
            assert may_compute.wait(120)
            execute(orders)

        monkeypatch.setattr(second, "execute_launched", held)
        stream = asyncio.create_task(generate(fleet, "r", prompt, 8))
        try:
            async with asyncio.timeout(60):
                while True:
                    leases = [handoff.lease for handoff in fleet.replicas["d0"].service._handoffs]
                    arrived = [layers for lease in leases for layers in lease.arrived_layers.values()]
                    if arrived == [0b11] * 4:  # a bit by layer
                        break
                    await asyncio.sleep(0.01)
            assert leases[0].commit is None and not stream.done()
        finally:
            may_compute.set()
        assert await stream == reference(model, prompt, 8)
        await fleet.until_quiet()


@pytest.mark.parametrize("lender", ["p0", "d0"])
async def test_a_prefix_is_pulled_from_stages_and_by_stages(tiny_llama, lender):
    path, model = tiny_llama
    (prompt,) = random_prompts(4, (100,))
    async with running_fleet(path, 1, 0) as fleet:
        await fleet.add("d0", Role.DECODE, **TWO_STAGES)
        await fleet.add("p1", Role.PREFILL, **TWO_STAGES)
        await fleet.add("d1", Role.DECODE, **TWO_RANKS)
        await fleet.until_ready(4)
        steer(fleet, "p0", "d0")
        first = await generate(fleet, "first", prompt, 24)
        turn = prompt + first + random_prompts(5, (20,))[0]
        steer(fleet, "p1", "d1", lender)
        tokens, num_cached = await cached_tokens(fleet, "next", turn, 8)
        assert tokens == reference(model, turn, 8)
        assert num_cached == (112 if lender == "d0" else 96)
        await fleet.until_quiet()


async def test_a_prefix_comes_back_to_all_stages_from_host_memory(tiny_llama):
    path, model = tiny_llama
    prompts = [[(7 * n + 3 * i) % 250 for i in range(97)] for n in range(4)]
    pool = PoolConfig(num_blocks=10, max_num_seqs=1, max_num_batched_tokens=64, tiers=TiersConfig(host_mib=4))
    local = SchedulerConfig(local_prefill_max_tokens=1000)
    async with running_fleet(path, 1, 0, pool, scheduler=local) as fleet:
        decode = await fleet.add("d0", Role.DECODE, **TWO_STAGES)
        await fleet.until_ready(2)
        expected = [reference(model, prompt, 4) for prompt in prompts]
        for turn in "ab":
            assert [await generate(fleet, f"{turn}{n}", p, 4) for n, p in enumerate(prompts)] == expected
            status = await tiers_at_rest(decode)
        assert status["host"].num_found >= 3 * 6
        layout = decode.info.layout
        assert status["device"].bytes_in == status["host"].num_found * 2 * layout.block_bytes_per_rank
        await fleet.until_quiet()


async def test_a_replica_of_stages_borrows_the_weights_of_one_like_it(tiny_llama, caplog):
    caplog.set_level("INFO")
    path, model = tiny_llama
    (prompt,) = random_prompts(6, (50,))
    transfer = TransferConfig(weights_trial_mib=0.02, layers_per_group=1)
    async with running_fleet(path, 0, 0, transfer=transfer) as fleet:
        lender = await fleet.add("d0", Role.DECODE, **TWO_STAGES)
        await fleet.add("d1", Role.DECODE, weight_lenders=lender.info.rank_addresses, **TWO_STAGES)
        assert caplog.text.count("from peer") == 2
        await fleet.stop("d0")
        await fleet.until_ready(1)
        assert await generate(fleet, "r", prompt, 12) == reference(model, prompt, 12)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_killed_stage_ends_its_replica_and_requests_go_on_elsewhere(tiny_llama, tmp_path, role):
    path, model = tiny_llama
    prompts = random_prompts(3, (400,) * 4)
    name = f"{role.value[0]}0"
    specs = specs_of(name, role, 1, path, **TWO_STAGES) + specs_of(f"{name[0]}1", role, 1, path)
    ranks = {(spec.replica_id, spec.rank): RankProcess(spec, tmp_path) for spec in specs}
    others = (0, 1) if role is Role.PREFILL else (1, 0)
    async with rank_processes(list(ranks.values())) as infos, running_fleet(path, *others) as fleet:
        for info in infos.values():
            fleet.register(info)
        await fleet.until_ready(3)
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 60)) for i, prompt in enumerate(prompts)]
        client = RpcClient(UNGUARDED)
        while (await client.call(infos[name].address, HEALTH, Empty(), 2)).num_steps == 0:
            await asyncio.sleep(0.001)
        ranks[name, 1].kill()
        await client.close()
        for prompt, output in zip(prompts, await asyncio.gather(*streams), strict=True):
            assert len(output) == 60 and are_greedy(model, prompt, output)
        assert await ranks[name, 0].wait() != 0, "the first stage must not outlive the second"


async def test_a_killed_stage_of_an_idle_replica_is_noticed(tiny_llama, tmp_path):
    ranks = [RankProcess(spec, tmp_path) for spec in specs_of("p0", Role.PREFILL, 1, tiny_llama[0], **TWO_STAGES)]
    async with rank_processes(ranks):
        ranks[1].kill()
        assert await ranks[0].wait() != 0
        assert "stage is lost" in ranks[0].log()

"""The same main as a plain process, tensor parallel on either side, Gloo between: tokens against transformers."""

import asyncio
import random
import signal
from dataclasses import replace

import pytest

from bench.rank_processes import RankProcess, rank_processes, replica_ranks
from core.config import ModelConfig, PoolConfig, TransferConfig
from core.messages.fleet import Empty, Role
from core.messages.to_rank import ReadTimeline
from core.sampling import SamplingParams
from core.security import UNGUARDED
from rpc.client import RpcClient
from rpc.methods import HEALTH, READ_TIMELINE
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import PlainEngine, make_runner
from tests.fleet.in_process_fleet import BLOCK_SIZE, generate, run, running_fleet
from tests.fleet.oracle import are_greedy
from tests.fleet.test_fleet import reference
from worker.spec import RankSpec


def specs_of(name: str, role: Role, tensor_parallel: int, path, channel: str = "auto", **pool: float) -> list[RankSpec]:
    config = PoolConfig(
        num_blocks=128, max_num_seqs=8, max_num_batched_tokens=64, tensor_parallel=tensor_parallel, **pool
    )
    model = ModelConfig(path=str(path), name="m", dtype="float32")
    transfer = TransferConfig(channel=channel, layers_per_group=1, slab_mib=0.01)
    return replica_ranks(name, role, model, config, transfer, BLOCK_SIZE)


SETTINGS = [
    (1, 1, "gloo", "qwen2"),
    (1, 2, "gloo", "llama"),
    (2, 1, "gloo", "qwen3"),
    (2, 2, "gloo", "qwen2"),
    (1, 1, "shared_memory", "qwen3"),
    (1, 2, "tcp", "deepseek_v3"),
    (2, 2, "shared_memory", "deepseek_v2"),
    (1, 1, "tcp", "mistral"),
    (1, 2, "shared_memory", "gemma3"),
    (2, 1, "tcp", "gpt_oss"),
    (2, 2, "shared_memory", "gemma2"),
]
MORE_SETTINGS = [
    (prefill_tp, decode_tp, channel, family)
    for prefill_tp in (1, 2)
    for decode_tp in (1, 2)
    for channel in ("gloo", "shared_memory")
    for family in ("llama", "qwen2", "qwen3", "gemma3")
    if (prefill_tp, decode_tp, channel, family) not in SETTINGS
]
PROMPTS = [[random.Random(n).randrange(384) for _ in range(n)] for n in (5, 16, 33, 100, 230, 400)]
SAMPLING = [SamplingParams(16, temperature=(0.0, 0.9)[i % 2], top_p=0.95, seed=i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("prefill_tp", "decode_tp", "channel", "family"),
    SETTINGS + [pytest.param(*setting, marks=pytest.mark.soak) for setting in MORE_SETTINGS],
)
async def test_tokens_do_not_depend_on_tensor_parallelism(tmp_path, prefill_tp, decode_tp, channel, family):
    """Greedy and sampled, against the plain engine at tensor parallel 1."""
    path = make_checkpoint(tmp_path / "model", family)
    runner = make_runner(path)
    expected = [s.output for s in PlainEngine(runner, max_num_seqs=1).generate(PROMPTS, SAMPLING)]
    runner.close()
    specs = specs_of("p0", Role.PREFILL, prefill_tp, path, channel)
    specs += specs_of("d0", Role.DECODE, decode_tp, path, channel)
    ranks = {(spec.replica_id, spec.rank): RankProcess(spec, tmp_path) for spec in specs}
    async with rank_processes(list(ranks.values())) as infos, running_fleet(path, 0, 0) as fleet:
        for info in infos.values():
            fleet.register(info)
        await fleet.until_ready(2)
        requests = [
            run(fleet, f"r{i}", *request, "pair") for i, request in enumerate(zip(PROMPTS, SAMPLING, strict=True))
        ]
        assert await asyncio.gather(*requests) == expected
        ranks["p0", 0].process.send_signal(signal.SIGTERM)
        assert await ranks["p0", 0].wait() == 0


async def test_receives_within_a_small_window_run_beside_all_reduces(tiny_llama, tmp_path):
    """Decode of two ranks steps on while KV of other requests comes in, never more of it than the window at a time."""
    path, model = tiny_llama
    rng = random.Random(5)
    early, late = ([[rng.randrange(256) for _ in range(n)] for n in lengths] for lengths in ((40,) * 2, (200,) * 4))
    window = TransferConfig(
        channel="gloo", layers_per_group=1, slab_mib=0.004, pair_window_mib=0.004, rank_window_mib=0.004
    )
    specs = specs_of("p0", Role.PREFILL, 1, path) + specs_of("d0", Role.DECODE, 2, path)
    ranks = [RankProcess(replace(spec, transfer=window), tmp_path) for spec in specs]
    client = RpcClient(UNGUARDED)
    async with rank_processes(ranks) as infos, running_fleet(path, 0, 0) as fleet:
        for info in infos.values():
            fleet.register(info)
        await fleet.until_ready(2)
        streams = [asyncio.create_task(generate(fleet, f"early{i}", prompt, 400)) for i, prompt in enumerate(early)]
        while fleet.scheduler._admission.fleet.get("d0").status.num_running < len(early):
            await asyncio.sleep(0.01)
        outputs = await asyncio.gather(*(generate(fleet, f"late{i}", prompt, 4) for i, prompt in enumerate(late)))
        assert not any(stream.done() for stream in streams), "decode was busy all the while"
        for prompt, output in zip(late + early, outputs + await asyncio.gather(*streams), strict=True):
            assert are_greedy(model, prompt, output)
        for address in infos["d0"].rank_addresses:
            events = (await client.call(address, READ_TIMELINE, ReadTimeline(""), 2)).events
            wires = [event for event in events if event.phase == "wire"]
            in_flight = [
                sum(other.num_bytes for other in wires if other.begun_at <= event.begun_at < other.ended_at)
                for event in wires
            ]
            assert 0 < max(in_flight) <= window.rank_window_mib * 2**20
    await client.close()


async def test_a_killed_follower_rank_ends_its_replica_and_streams_go_on_elsewhere(tiny_llama, tmp_path):
    path, model = tiny_llama
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(40)] for _ in range(4)]
    expected = [reference(model, prompt, 100) for prompt in prompts]
    specs = specs_of("d0", Role.DECODE, 2, path) + specs_of("d1", Role.DECODE, 1, path)
    ranks = {(spec.replica_id, spec.rank): RankProcess(spec, tmp_path) for spec in specs}
    async with rank_processes(list(ranks.values())) as infos, running_fleet(path, 1, 0) as fleet:
        for info in infos.values():
            fleet.register(info)
        await fleet.until_ready(3)
        await asyncio.sleep(1.1)
        client = RpcClient(UNGUARDED)
        follower = await client.call(infos["d0"].rank_addresses[1], HEALTH, Empty(), 2)
        await client.close()
        assert follower.busy_s < 1, "an idle follower does not count as one that hangs"
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 100)) for i, prompt in enumerate(prompts)]
        while fleet.scheduler._admission.fleet.get("d0").status.num_running == 0:
            await asyncio.sleep(0.01)
        ranks["d0", 1].kill()
        assert await asyncio.gather(*streams) == expected
        assert await ranks["d0", 0].wait() != 0, "the leader must not outlive its follower"


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_sigterm_to_any_rank_drains_its_replica(tiny_llama, tmp_path, rank):
    path, model = tiny_llama
    rng = random.Random(4)
    prompts = [[rng.randrange(256) for _ in range(40)] for _ in range(4)]
    expected = [reference(model, prompt, 100) for prompt in prompts]
    specs = specs_of("d0", Role.DECODE, 2, path, drain_timeout_s=0.0) + specs_of("d1", Role.DECODE, 1, path)
    ranks = {(spec.replica_id, spec.rank): RankProcess(spec, tmp_path) for spec in specs}
    async with rank_processes(list(ranks.values())) as infos, running_fleet(path, 1, 0) as fleet:
        for info in infos.values():
            fleet.register(info)
        await fleet.until_ready(3)
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 100)) for i, prompt in enumerate(prompts)]
        while fleet.scheduler._admission.fleet.get("d0").status.num_running == 0:
            await asyncio.sleep(0.01)
        ranks["d0", rank].process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*streams) == expected
        assert [await ranks["d0", each].wait() for each in (0, 1)] == [0, 0]
        log = (tmp_path / "d0-0.log").read_text()
        assert "requests over" in log and "drained, nothing is held" in log

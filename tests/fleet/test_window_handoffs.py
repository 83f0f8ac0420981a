"""Models whose layers see windows: handoffs move what decode will see, in pools that could not hold all of it."""

import asyncio
import random

import pytest

from cluster.ingress.generation import Generation
from core.config import PoolConfig, TransferConfig
from core.sampling import SamplingParams
from tests.checkpoints import WINDOW, make_checkpoint
from tests.engine.plain_engine import BLOCK_SIZE, PlainEngine, make_runner
from tests.fleet.in_process_fleet import run, running_fleet
from tests.fleet.test_handoff_parity import channels
from tests.fleet.test_pulls import DECODE_LENDS, PREFILL_LENDS, steer

LENGTHS = (1, 16, 33, 41, 64, 100, 230, 400, 700)
PROMPTS = [[random.Random(n).randrange(384) for _ in range(n)] for n in LENGTHS]
NUM_TOKENS = 48
SAMPLING = [SamplingParams(NUM_TOKENS, temperature=(0.0, 0.9)[i % 2], seed=i) for i in range(len(PROMPTS))]
CHUNK = 64
POOL = PoolConfig(num_blocks=192, max_num_seqs=16, max_num_batched_tokens=CHUNK)
NUM_GROUPS = {"mistral": (0, 1), "gemma2": (1, 2), "gemma3": (1, 2), "gpt_oss": (1, 2)}  # without, with a window
FAMILIES = list(NUM_GROUPS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By family: (checkpoint, the tokens of a lone engine, bytes of a block)."""
    known = {}

    def of(family: str):
        if family not in known:
            checkpoint = make_checkpoint(tmp_path_factory.mktemp(family), family)
            runner = make_runner(checkpoint)
            outputs = [s.output for s in PlainEngine(runner, max_num_seqs=1).generate(PROMPTS, SAMPLING)]
            known[family] = checkpoint, outputs, runner.layout.block_bytes_per_rank
            runner.close()
        return known[family]

    return of


def num_blocks_to_move(family: str, num_tokens: int) -> int:
    """All blocks of groups without a window, of the others those that the last tokens lie in."""
    num_full, num_windowed = NUM_GROUPS[family]
    num_logical = -(-num_tokens // BLOCK_SIZE)
    return num_full * num_logical + num_windowed * (num_logical - max(0, num_tokens - WINDOW + 1) // BLOCK_SIZE)


@pytest.mark.parametrize("kind", ["in_process", "strict", "shared_memory", "tcp", "local"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_are_the_lone_engines_in_pools_that_hold_windows_alone(expected, family, kind):
    """The 1,585 tokens of the prompts and their outputs would fill more blocks than there are."""
    checkpoint, outputs, _ = expected(family)
    transfer = TransferConfig(layers_per_group=1, slab_mib=0.01, digest_share=1.0)
    connect = channels("in_process" if kind == "local" else kind)
    if kind in ("shared_memory", "tcp"):
        transfer, connect = transfer.model_copy(update={"channel": kind}), channels("gloo")
    async with running_fleet(checkpoint, pool=POOL, transfer=transfer, connect=connect) as fleet:
        placement = "local" if kind == "local" else "pair"
        requests = [
            run(fleet, f"r{i}", *request, placement) for i, request in enumerate(zip(PROMPTS, SAMPLING, strict=True))
        ]
        assert await asyncio.gather(*requests) == outputs
        prefilled = fleet.replicas["p0"].service._context.engine.num_steps
        assert (prefilled > 0) == (placement == "pair")
        await fleet.until_quiet()


@pytest.mark.parametrize("family", FAMILIES)
async def test_what_is_behind_a_window_is_not_moved(expected, family):
    checkpoint, outputs, block_bytes = expected(family)
    async with running_fleet(checkpoint, pool=POOL, connect=channels("in_process")) as fleet:
        for i, prompt in enumerate(PROMPTS):
            generation = Generation(f"r{i}", tuple(prompt), SAMPLING[i], 60, "pair")
            got: list[int] = []
            async for event in fleet.orchestrator.generate(generation):
                got += event.token_ids
                if event.phases:
                    num_blocks = num_blocks_to_move(family, len(prompt))
                    assert event.phases.num_blocks_received == num_blocks
                    assert event.phases.transfer_bytes == num_blocks * block_bytes
            assert got == outputs[i]
        await fleet.until_quiet()


@pytest.mark.parametrize(("prefill", "decode", "lender"), [*PREFILL_LENDS, *DECODE_LENDS])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
async def test_a_pulled_prefix_comes_with_its_windows(expected, family, prefill, decode, lender):
    """Of layers with a window, its last blocks alone."""
    checkpoint, outputs, _ = expected(family)
    prompt, first = PROMPTS[7], outputs[7]
    turn, sampling = prompt + first + PROMPTS[5][:30], SamplingParams(NUM_TOKENS, temperature=0.0)
    runner = make_runner(checkpoint)
    (alone,) = PlainEngine(runner).generate([turn], [sampling])
    runner.close()
    async with running_fleet(checkpoint, 2, 2, pool=POOL) as fleet:
        steer(fleet, "p0", "d0")
        assert await run(fleet, "first", prompt, SAMPLING[7]) == first
        before = {name: replica.pool.num_cached for name, replica in fleet.replicas.items()}
        steer(fleet, prefill, decode, lender)
        assert await run(fleet, "next", turn, sampling) == alone.output
        taker = fleet.replicas[prefill or decode]
        # decode has computed all but the last of its tokens as well; prefill only the prompt
        depth = (447 if lender == "d0" else 400) // BLOCK_SIZE
        assert before[taker.info.replica_id] == 0
        assert taker.service._context.agent.inbound is not None
        num_computed = len(turn) - depth * BLOCK_SIZE
        assert taker.service._context.engine.num_steps >= -(-num_computed // CHUNK)
        moved = sum(event.num_bytes for event in taker.service._context.agent.timeline.of("") if event.phase == "wire")
        num_full, num_windowed = NUM_GROUPS[family]
        block_bytes = taker.info.layout.block_bytes_per_rank
        assert moved == block_bytes * (num_full * depth + num_windowed * 3)
        await fleet.until_quiet()


async def test_clients_that_leave_leave_nothing(expected):
    checkpoint, outputs, _ = expected("gpt_oss")
    async with running_fleet(checkpoint, 2, 2, pool=POOL) as fleet:

        async def client(i: int, leaves_after_s: float) -> None:
            request = run(fleet, f"r{i}", PROMPTS[i % len(PROMPTS)], SAMPLING[i % len(PROMPTS)])
            try:
                assert await asyncio.wait_for(request, leaves_after_s) == outputs[i % len(PROMPTS)]
            except TimeoutError:
                return

        delays = (0.01, 0.03, 0.1, 0.2, 0.4, 60.0)
        await asyncio.gather(*(client(i, delays[i % len(delays)]) for i in range(27)))
        await fleet.until_quiet()


async def test_a_decode_that_dies_costs_no_token(expected):
    checkpoint, outputs, _ = expected("gemma3")
    async with running_fleet(checkpoint, 1, 2, pool=POOL) as fleet:
        requests = [asyncio.create_task(run(fleet, f"r{i}", PROMPTS[i], SAMPLING[i])) for i in range(len(PROMPTS))]
        while not fleet.replicas["d0"].service._context.engine.num_steps > 5:
            await asyncio.sleep(0.01)
        await fleet.stop("d0")
        assert await asyncio.gather(*requests) == outputs
        await fleet.until_quiet()

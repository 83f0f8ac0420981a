"""A prefix cached on any replica is fetched by any other instead of computed again: one mechanism, all directions."""

import asyncio
from dataclasses import replace

import pytest

from cluster.ingress.generation import Generation
from cluster.scheduler.candidate import Decision, Terms
from cluster.scheduler.policy import Choices, Memoryless
from core.block_hash import hash_blocks
from core.config import PoolConfig
from core.errors import PeerLost
from core.messages.to_lender import Borrow, TakeOver
from core.sampling import SamplingParams
from rpc import methods
from tests.fleet.in_process_fleet import FleetHandle, generate, running_fleet
from tests.fleet.test_fleet import random_prompts, reference


def steer(fleet: FleetHandle, prefill: str | None, decode: str, lender: str | None = None) -> None:
    """Every further request runs there, pulling from there."""
    admission = fleet.scheduler._admission

    def view(name):
        return admission.fleet.get(fleet.replicas[name].info.replica_id) if name else None

    class Steered(Memoryless):
        def decide(self, request, choices: Choices) -> Decision:
            reason = "pair" if prefill else "local_asked"
            return Decision(view(prefill), view(decode), reason, Terms(), 1, 1, lender=view(lender))

    admission.policy = Steered()


async def cached_tokens(fleet: FleetHandle, name: str, prompt, max_tokens: int) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt whoever prefilled found cached."""
    tokens, num_cached = [], 0
    generation = Generation(name, tuple(prompt), SamplingParams(max_tokens, temperature=0.0), 30)
    async for event in fleet.orchestrator.generate(generation):
        tokens += event.token_ids
        num_cached = max(num_cached, event.num_cached_tokens or 0)
    return tokens, num_cached


PREFILL_LENDS = [("p1", "d1", "p0"), (None, "d1", "p0")]
DECODE_LENDS = [("p1", "d1", "d0"), (None, "d1", "d0")]


@pytest.mark.parametrize(("prefill", "decode", "lender"), [*PREFILL_LENDS, *DECODE_LENDS])
async def test_a_prefix_travels_from_any_replica_to_any_other(tiny_llama, prefill, decode, lender):
    path, model = tiny_llama
    (prompt,) = random_prompts(4, (100,))
    async with running_fleet(path, 2, 2) as fleet:
        steer(fleet, "p0", "d0")
        first = await generate(fleet, "first", prompt, 24)
        turn = prompt + first + random_prompts(5, (20,))[0]
        steer(fleet, prefill, decode, lender)
        tokens, num_cached = await cached_tokens(fleet, "next", turn, 8)
        assert tokens == reference(model, turn, 8)
        # decode has computed all but the last of its tokens as well; prefill only the prompt
        assert num_cached == (112 if lender == "d0" else 96)
        await fleet.until_quiet()
        assert [len(replica.service._context.lender) for replica in fleet.replicas.values()] == [0] * 4


async def test_a_prefix_that_many_want_at_a_time_is_pulled_once(tiny_llama):
    path, model = tiny_llama
    prompts = [random_prompts(6, (96,))[0] + tail for tail in random_prompts(7, (9, 17, 30))]
    async with running_fleet(path, 2, 2) as fleet:
        steer(fleet, "p0", "d0")
        await generate(fleet, "first", prompts[0][:96], 2)
        lender, borrows = fleet.replicas["p0"].service._context.lender, []
        lend = lender.lend
        lender.lend = lambda message, now: borrows.append(message.loan_id) or lend(message, now)
        steer(fleet, "p1", "d1", "p0")
        answers = await asyncio.gather(*(generate(fleet, f"r{i}", prompt, 6) for i, prompt in enumerate(prompts)))
        assert list(answers) == [reference(model, prompt, 6) for prompt in prompts]
        assert len(borrows) == 1
        await fleet.until_quiet()


async def test_a_lender_that_has_nothing_any_more_or_is_gone_costs_nothing_but_the_computation(tiny_llama, monkeypatch):
    path, model = tiny_llama
    (prompt,) = random_prompts(8, (100,))
    async with running_fleet(path, 2, 1) as fleet:
        steer(fleet, "p1", "d0", "p0")  # p0 never saw the prompt
        assert await generate(fleet, "nothing", prompt, 6) == reference(model, prompt, 6)
        gone = replace(fleet.replicas["p0"].info, rank_addresses=("127.0.0.1:1",))
        other = prompt[50:] + prompt[:50]
        client, call = fleet.replicas["p1"].service._context.client, fleet.replicas["p1"].service._context.client.call

        async def call_gone(address, method, request, timeout_s):
            if method in (methods.BORROW, methods.GIVE_BACK):
                address = gone.address
            return await call(address, method, request, timeout_s)

        monkeypatch.setattr(client, "call", call_gone)
        with pytest.raises(PeerLost):
            await client.call("anywhere", methods.GIVE_BACK, None, 0.2)
        assert await generate(fleet, "gone", other, 6) == reference(model, other, 6)
        await fleet.until_quiet()


async def test_a_replica_without_room_for_the_prefix_computes_it(tiny_llama):
    path, model = tiny_llama
    (prompt,) = random_prompts(9, (150,))
    pool = PoolConfig(num_blocks=11, max_num_seqs=4, max_num_batched_tokens=64)
    async with running_fleet(path, 2, 1, pool=pool) as fleet:
        steer(fleet, "p0", "d0")
        expected = reference(model, prompt, 4)
        assert await generate(fleet, "first", prompt, 4) == expected
        held = fleet.replicas["p1"].pool.allocate(3)  # the prompt's ten blocks fit in neither way until these are back
        steer(fleet, "p1", "d0", "p0")
        answer = asyncio.create_task(generate(fleet, "second", prompt, 4))
        await asyncio.sleep(0)
        fleet.replicas["p1"].pool.disown(held)
        assert await answer == expected
        await fleet.until_quiet()


async def test_loans_that_nobody_gives_back_expire(tiny_llama):
    path, _ = tiny_llama
    (prompt,) = random_prompts(10, (64,))
    async with running_fleet(path, 1, 1) as fleet:
        await generate(fleet, "first", prompt, 2)
        await fleet.until_quiet()
        replica = fleet.replicas["p0"]
        lender = replica.service._context.lender
        lent = lender.lend(Borrow("lost", hash_blocks(tuple(prompt), 16), 0), 0.0)
        assert len(lent.source_blocks) == 4 and replica.pool.num_held == 4
        lender.validate()
        assert lender.give_back_expired(29.0) == []
        assert lender.give_back_expired(31.0) == ["lost"]
        assert replica.pool.num_held == 0


@pytest.mark.parametrize("taker", ["p1", "d1"])
async def test_a_replica_takes_a_prefix_over_before_anybody_asks_it_for_that(tiny_llama, taker):
    path, model = tiny_llama
    shared, tail = random_prompts(9, (96, 12))
    async with running_fleet(path, 2, 2) as fleet:
        steer(fleet, "p0", "d0")
        await generate(fleet, "first", shared + random_prompts(10, (7,))[0], 2)
        hashes, source = hash_blocks(shared, 16), fleet.replicas["p0"].info
        taking = fleet.replicas[taker]

        async def copy(message: TakeOver) -> None:
            await fleet._plane.client.call(taking.info.address, methods.TAKE_OVER, message, 5)

        await asyncio.gather(*(copy(TakeOver(f"s.{number}", hashes, source)) for number in range(3)))
        assert all(key in taking.pool for key in hashes)
        steer(fleet, taker if taker == "p1" else None, "d1")
        assert await cached_tokens(fleet, "next", shared + tail, 8) == (reference(model, shared + tail, 8), 96)
        await fleet.stop("p0")
        await copy(TakeOver("s.gone", hash_blocks(random_prompts(11, (96,))[0], 16), source))  # nobody lends: no harm
        await fleet.until_quiet()


@pytest.mark.parametrize("prefill", ["p1", None])
async def test_a_pull_that_takes_much_longer_than_foreseen_is_waited_for_no_more(tiny_llama, prefill):
    """The prompt is computed meanwhile, and what comes late is cached for the next one."""
    path, model = tiny_llama
    shared, tail = random_prompts(12, (96, 12))
    async with running_fleet(path, 2, 2) as fleet:
        steer(fleet, "p0", "d0")
        await generate(fleet, "first", shared + random_prompts(13, (7,))[0], 2)
        taker = fleet.replicas[prefill or "d1"].service
        borrower = taker._borrower if prefill else taker._sources._borrower
        bring, late = borrower._bring, asyncio.Event()

        async def bring_late(*args):
            await late.wait()
            return await bring(*args)

        borrower._bring = bring_late
        steer(fleet, prefill, "d1", "p0")
        assert await cached_tokens(fleet, "next", shared + tail, 8) == (reference(model, shared + tail, 8), 0)
        late.set()
        await fleet.until_quiet()
        assert len(taker._pulls if prefill else taker._sources._under_way) == 0

"""Handoffs of random sizes while messages get lost and wires break: right tokens, and nothing held at the end."""

import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import aclosing

import pytest
from transformers import AutoModelForCausalLM

from cluster.ingress.generation import Generation
from core.config import PoolConfig, TransferConfig
from core.errors import PeerError
from core.sampling import SamplingParams
from kv_transfer.agent import TransferAgent
from tests.checkpoints import make_checkpoint
from tests.fleet.faults import RandomFaults, meddle_with_all_calls
from tests.fleet.in_process_fleet import FleetHandle, running_fleet
from tests.fleet.oracle import are_greedy

SHARE_OF_FAULTS = 0.05
NUM_CLIENTS = 10
VOCABULARY = 384
MAX_TOKENS = 5
POOL = PoolConfig(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=128)
TRANSFER = TransferConfig(
    layers_per_group=2,
    slab_mib=0.03,
    digest_share=1.0,
    pair_window_mib=0.06,
    rank_window_mib=0.09,
    control_timeout_s=1.0,
    data_timeout_s=2.0,
    lease_ttl_s=4.0,
)


class Requests:
    """Random prompts, most of which begin like others, and clients of which some leave early."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._prefixes = [self._tokens(length) for length in (16, 48, 100, 130)]

    def prompt(self) -> tuple[int, ...]:
        prefix = self._random.choice(self._prefixes) if self._random.random() < 0.6 else []
        return (*prefix, *self._tokens(self._random.randint(1, 80)))

    def leave_after_tokens(self) -> int | None:
        return self._random.randrange(MAX_TOKENS) if self._random.random() < 0.05 else None

    def _tokens(self, length: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(length)]


def channel_threads() -> set[str]:
    """The ends of channels that have a thread in this process."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("channel ")}


def channel_ends(agent: TransferAgent) -> set[str]:
    """The same, by the agent's own books; an end that failed needs no thread."""
    ends = [link.end for link in (*agent.inbound._links.values(), *agent.outbound._links.values())]
    return {end._lane._thread.name for end in ends if end is not None and end.is_open}


async def until_channels_rest(fleet: FleetHandle) -> None:
    """No pair has a busy slab, no byte is counted as in flight, and no thread serves a channel that nobody knows."""
    agents = [replica.rank._serving.agent for replica in fleet.replicas.values()]

    def busy() -> list[object]:
        found: list[object] = []
        for agent in agents:
            found += [key for key, pair in agent.outbound._pairs.book._pairs.items() if pair.num_users]
            found += [*agent.inbound._flow.in_flight, *agent.inbound._flow.flows, *agent.inbound._linking]
        return found + sorted(channel_threads() ^ set().union(*map(channel_ends, agents)))

    try:
        async with asyncio.timeout(15):
            while busy():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"channels do not rest: {busy()}") from None


async def run_handoffs(monkeypatch, tmp_path, num_handoffs: int, seed: int) -> Counter[str]:
    path = make_checkpoint(tmp_path / "model", "llama", eos_token_id=None)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    requests = Requests(seed)
    faults = RandomFaults(seed, SHARE_OF_FAULTS)
    meddle_with_all_calls(monkeypatch, faults)
    monkeypatch.setattr("bench.control_plane.MAX_ATTEMPTS", 20)  # a third of the attempts meets with a fatal fault
    outcomes: Counter[str] = Counter()
    threads_before = channel_threads()
    started = time.monotonic()
    async with running_fleet(path, 2, 2, pool=POOL, transfer=TRANSFER, connect=faults.connect()) as fleet:
        names = iter(range(num_handoffs))

        async def client() -> None:
            for name in names:
                prompt, leave_after, output = requests.prompt(), requests.leave_after_tokens(), []
                sampling = SamplingParams(MAX_TOKENS, temperature=0.0)
                generation = Generation(f"r{name}", prompt, sampling, 60.0, "pair")
                try:
                    async with aclosing(fleet.orchestrator.generate(generation)) as events:
                        async for event in events:
                            output += event.token_ids
                            outcomes["resumed"] += event.finish_reason is not None and event.num_resumes > 0
                            if leave_after is not None and len(output) > leave_after:
                                break
                except PeerError as error:
                    outcomes["errors"] += 1
                    print(f"r{name} after {len(output)} tokens: {error}")
                    continue
                outcomes["finished" if len(output) == MAX_TOKENS else "left"] += 1
                assert len(output) == MAX_TOKENS or leave_after is not None
                assert await asyncio.to_thread(are_greedy, model, prompt, output), f"r{name}"

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        worked_s = time.monotonic() - started
        await fleet.until_quiet()
        await until_channels_rest(fleet)
        quiet_s = time.monotonic() - started - worked_s
    assert channel_threads() == threads_before
    print(f"{num_handoffs} handoffs in {worked_s:.1f} s, quiet after {quiet_s:.1f} s: {dict(outcomes)}")
    print(f"of {faults.num_messages} messages, {faults.num_slabs} slabs: {dict(faults.counts)}")
    return outcomes


async def test_two_hundred_handoffs_with_faults(monkeypatch, tmp_path):
    outcomes = await run_handoffs(monkeypatch, tmp_path, 200, seed=1)
    assert outcomes["resumed"] > 10 and not outcomes["errors"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_ten_thousand_handoffs_with_faults(monkeypatch, tmp_path):
    outcomes = await run_handoffs(monkeypatch, tmp_path, 10_000, seed=2)
    assert outcomes["resumed"] > 500 and not outcomes["errors"]

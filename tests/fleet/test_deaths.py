"""A replica that ends in exactly one phase of a handoff, and comes back under its name: nobody else holds anything."""

import asyncio
from collections.abc import Callable

import pytest

from core.config import TransferConfig
from core.messages.fleet import Role
from rpc.methods import COMMIT, DIGEST_BLOCKS, PREFILL, READY
from tests.fleet.faults import Gate, RandomFaults, meddle_with_all_calls
from tests.fleet.in_process_fleet import generate, running_fleet
from tests.fleet.oracle import are_greedy
from tests.fleet.test_fleet import random_prompts
from tests.fleet.test_handoff_soak import until_channels_rest

TRANSFER = TransferConfig(
    layers_per_group=1, slab_mib=0.004, digest_share=1.0, control_timeout_s=1.0, data_timeout_s=2.0, lease_ttl_s=4.0
)
PHASES: dict[str, Callable[[], Gate]] = {
    "opened, nothing announced": lambda: Gate(PREFILL.name),
    "announced, nothing granted": lambda: Gate(READY.name),
    "slabs on the wire": lambda: Gate(READY.name, delivered=True),
    "all but compared": lambda: Gate(DIGEST_BLOCKS.name),
    "prefill is done, nobody knows": lambda: Gate(COMMIT.name),
    "committed before the last byte": lambda: Gate(READY.name, after=COMMIT.name),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("role", Role)
async def test_a_replica_ends_while_a_handoff_is(tiny_llama, monkeypatch, phase, role):
    path, model = tiny_llama
    prompts = random_prompts(1, [100, 60, 150, 40])
    gate = PHASES[phase]()
    meddle_with_all_calls(monkeypatch, gate)
    connect = RandomFaults(seed=0, share=0.0).connect()
    async with running_fleet(path, 2, 2, transfer=TRANSFER, connect=connect) as fleet:
        streams = [asyncio.create_task(generate(fleet, f"r{i}", prompt, 8)) for i, prompt in enumerate(prompts)]
        await gate.until_reached()
        names = [name for name, replica in fleet.replicas.items() if replica.info.role is role]
        held = fleet.held()
        victim = max(names, key=lambda name: held.get(f"{name} books", 0))
        fleet.replicas[victim].rank._client.is_mute = True
        await fleet.stop(victim)
        await fleet.add(victim, role)
        gate.opened.set()
        for prompt, output in zip(prompts, await asyncio.gather(*streams), strict=True):
            assert len(output) == 8 and are_greedy(model, prompt, output)
        await fleet.until_quiet()
        await until_channels_rest(fleet)

"""A local fleet that grows under load, shrinks after it to nothing, and comes back.

In a process of its own: Ray's switches are set once.
"""

import asyncio
from collections.abc import Callable

from cluster.local import free_port, local_fleet
from cluster.settings import DEMO_MODEL_NAME, demo_model_path
from core.config import parse_config
from core.messages.fleet import Role
from tests.cluster.live_fleet import PROMPTS, Load, Oracle, client_of, pool_states

NUM_TOKENS = 96
PATIENCE_S = 90.0


def grow_shrink_and_come_back(log_dir: str) -> None:
    """Raises AssertionError on a wrong token, TimeoutError when the decode pool does not come to its size."""
    config = parse_config(
        {
            "model": {"path": str(demo_model_path()), "name": DEMO_MODEL_NAME, "dtype": "float32"},
            "prefill": {"min_replicas": 0, "num_blocks": 256, "drain_timeout_s": 2},
            "decode": {
                "min_replicas": 0, "max_replicas": 2, "num_blocks": 512, "max_num_seqs": 8, "drain_timeout_s": 1,
            },
            "autoscaling": {
                "policy": "slo", "interval_s": 0.5, "upscale_delay_s": 1, "downscale_delay_s": 4,
                "downscale_pause_s": 1, "replica_start_s": 10, "rate_window_s": 5, "itl_target_s": 5,
            },
            "scheduler": {"local_prefill_max_tokens": 64},
            "ingress": {"port": free_port(), "request_timeout_s": 120},
            "cluster": {"log_dir": log_dir},
        }
    )  # fmt: skip
    oracle = Oracle.load()
    expected = [oracle.tokens(prompt, NUM_TOKENS) for prompt in PROMPTS]
    with local_fleet(config, lambda _: None) as fleet:
        asyncio.run(_story(fleet, expected))


async def _story(fleet, expected: list[list[int]]) -> None:
    client = client_of(fleet)
    crowd = Load(client, expected, 8)
    await _until(lambda: pool_states(Role.DECODE) == {"RUNNING": 2}, crowd)
    more = Load(client, expected, 6)
    await more.until_done(6)
    await crowd.finish()
    await more.finish()
    few = Load(client, expected, 1)
    await _until(lambda: pool_states(Role.DECODE) == {"RUNNING": 1}, few)
    await few.until_done(few.num_done + 1)
    await few.finish()
    async with asyncio.timeout(PATIENCE_S):
        while await asyncio.to_thread(lambda: [pool_states(role) for role in Role]) != [{}, {}]:
            await asyncio.sleep(0.1)
    first = Load(client, expected, 2)  # waits in the scheduler's queue until a replica is there
    await first.until_done(2)
    await first.finish()


async def _until(holds: Callable[[], bool], load: Load) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(holds):
            load.require_health()
            await asyncio.sleep(0.1)

"""Autoscaling and plant in one loop, with a load that a function of time gives."""

import random
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise

from bench.fleet_plant import FleetPlant, PlantSpec
from cluster.autoscaling.autoscaling import Autoscaling
from core.config import BatonConfig, parse_config
from core.messages.fleet import Role

STEP_S = 0.5
NOON = datetime(2026, 11, 18, 12, tzinfo=UTC)  # a Wednesday
SPEC = PlantSpec(prefill_tokens_per_s=1000, held_prompt_tokens=1000, max_num_seqs=8, kv_tokens=40_000, start_s=10)


def config_of(max_replicas: int = 20, min_replicas: int = 1, **autoscaling) -> BatonConfig:
    """The slo policy with delays that suit a minute's test."""
    pool = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    section = {
        "policy": "slo", "interval_s": 1, "upscale_delay_s": 2, "downscale_delay_s": 40, "downscale_pause_s": 5,
        "replica_start_s": 10, "rate_window_s": 20, "ttft_target_s": 2, "itl_target_s": 0.05,
    } | autoscaling  # fmt: skip
    return parse_config({"prefill": pool, "decode": pool, "autoscaling": section})


class ClosedLoop:
    """One fleet under load; `sizes` are the targets of each tick."""

    def __init__(self, config: BatonConfig, spec: PlantSpec = SPEC, seed: int = 0, wall: datetime = NOON) -> None:
        num = {Role.PREFILL: config.prefill.min_replicas, Role.DECODE: config.decode.min_replicas}
        self.plant = FleetPlant(spec, num, config.autoscaling.rate_window_s, wall)
        self.sizes: list[tuple[int, int]] = []
        self._autoscaling = Autoscaling.of(config)
        self._interval_s = config.autoscaling.interval_s
        self._random = random.Random(seed)
        self._next_tick = 0.0

    def run(self, seconds: float, rate: Callable[[float], float], num_prompt: int = 400, num_output: int = 100) -> None:
        """Poisson arrivals at `rate(now)` per second, lengths uniform within a third of the given."""
        until = self.plant.now + seconds
        while self.plant.now < until:
            expected = rate(self.plant.now) * STEP_S
            for _ in range(self._poisson(expected)):
                self.plant.arrive(self._around(num_prompt), self._around(num_output))
            self.plant.advance(STEP_S)
            if self.plant.now >= self._next_tick:
                self._next_tick = self.plant.now + self._interval_s
                self._tick()

    def num_changes(self, since: int) -> int:
        """Of either pool's target, after that many ticks."""
        sizes = self.sizes[since:]
        return sum((a[0] != b[0]) + (a[1] != b[1]) for a, b in pairwise(sizes))

    def _tick(self) -> None:
        targets = self._autoscaling.decide(self.plant.signals())
        for role in Role:
            self.plant.resize(role, targets.of(role).num_replicas)
        self.sizes.append((targets.prefill.num_replicas, targets.decode.num_replicas))

    def _poisson(self, expected: float) -> int:
        count, at = 0, self._random.expovariate(1.0)
        while at < expected:
            count, at = count + 1, at + self._random.expovariate(1.0)
        return count

    def _around(self, num: int) -> int:
        return round(num * self._random.uniform(2 / 3, 4 / 3))

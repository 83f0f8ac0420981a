"""The shell: it resizes what differs, asks again for what failed, and outlives a policy that raises."""

import asyncio
from dataclasses import replace

import pytest

from cluster.autoscaler import Autoscaler
from cluster.autoscaling.autoscaling import Autoscaling
from cluster.autoscaling.budget import Budget
from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand, PoolSignals, Workload
from core.config import parse_config
from core.errors import PeerLost
from core.messages.fleet import Role
from tests.autoscaling.closed_loop import NOON

IDLE = PoolSignals(1, 1, 0, 0, 0, 1000.0, 0, 8, 0.0, 0.0)


class Wishes:
    """A policy that wants what the test wants."""

    def __init__(self, prefill: float, decode: float) -> None:
        self.prefill, self.decode = prefill, decode
        self.num_failures = 0

    def demand(self, signals: FleetSignals) -> Demand:
        if self.num_failures:
            self.num_failures -= 1
            raise ZeroDivisionError("a bug of the policy")
        return Demand(PoolDemand(self.prefill, "wished"), PoolDemand(self.decode, "wished"))


class FakeServe:
    """Serve's controller: `num_failures` calls fail."""

    def __init__(self, num_failures: int = 0) -> None:
        self.targets = dict.fromkeys(Role, 1)
        self.calls: list[tuple[Role, int]] = []
        self.num_failures = num_failures
        self.num_ready = 0  # in both pools whatever was asked for; 0: as asked for
        self.resized = asyncio.Event()

    async def resize(self, role: Role, num_replicas: int) -> None:
        self.calls.append((role, num_replicas))
        if self.num_failures:
            self.num_failures -= 1
            raise PeerLost("the controller is away")
        self.targets[role] = num_replicas
        self.resized.set()

    async def first_targets(self) -> dict[Role, int]:
        return dict(self.targets)


def make(policy: Wishes, serve: FakeServe, max_gpus: float = 0, **section) -> Autoscaler:
    pool = {"min_replicas": 1, "max_replicas": 9}
    now = {"upscale_delay_s": 0, "downscale_delay_s": 0, "downscale_pause_s": 0, "max_gpus": max_gpus}
    config = parse_config({"prefill": pool, "decode": pool, "autoscaling": now | section})
    ticks = iter(range(10**6))

    async def read(asked) -> FleetSignals:
        sizes = {role: target.num_replicas for role, target in asked.items()}
        pools = {role: replace(IDLE, num_ready=serve.num_ready or num, num_target=num) for role, num in sizes.items()}
        return FleetSignals(float(next(ticks)), NOON, pools[Role.PREFILL], pools[Role.DECODE], Workload(0, 0, 0))

    autoscaling = Autoscaling(config.autoscaling, policy, Budget.of(config))
    return Autoscaler(config.autoscaling, autoscaling, read, serve.resize, serve.first_targets)


async def test_both_pools_are_resized_once():
    serve = FakeServe()
    autoscaler = make(Wishes(3, 2), serve)
    for _ in range(3):
        await autoscaler.tick()
    assert sorted(serve.calls) == [(Role.DECODE, 2), (Role.PREFILL, 3)]
    assert [decision.targets.prefill.num_replicas for decision in autoscaler.history] == [3, 3, 3]
    assert autoscaler.history[0].signals.prefill.num_target == 1
    assert autoscaler.history[0].targets.prefill.reason == "wished: 3.00 needed"


async def test_a_resize_that_fails_is_tried_again_and_does_not_hold_up_the_other_pool(caplog):
    serve = FakeServe(num_failures=1)
    autoscaler = make(Wishes(3, 2), serve)
    await autoscaler.tick()
    assert list(serve.targets.values()).count(1) == 1
    assert "instead of" in caplog.text
    await autoscaler.tick()
    assert serve.targets == {Role.PREFILL: 3, Role.DECODE: 2}
    assert len(serve.calls) == 3


@pytest.mark.parametrize(("before", "after"), [(5, 2), (2, 5)])
async def test_replicas_that_have_not_started_or_drained_yet_change_no_mind(before, after):
    serve, policy = FakeServe(), Wishes(before - 0.25, before - 0.25)
    autoscaler = make(policy, serve, downscale_step=9, downscale_pause_s=3)
    await autoscaler.tick()
    serve.num_ready, policy.prefill, policy.decode = before, after - 0.25, after - 0.25
    for _ in range(6):
        await autoscaler.tick()
    assert serve.calls == [(role, num) for num in (before, after) for role in Role]


async def test_who_gives_back_goes_first():
    serve, policy = FakeServe(), Wishes(5, 1)
    autoscaler = make(policy, serve, max_gpus=6)
    await autoscaler.tick()
    policy.prefill, policy.decode = 4, 2
    await autoscaler.tick()
    assert serve.calls == [(Role.PREFILL, 5), (Role.PREFILL, 4), (Role.DECODE, 2)]


async def test_a_new_scheduler_goes_on_from_what_serve_follows():
    serve = FakeServe()
    serve.targets = {Role.PREFILL: 4, Role.DECODE: 6}
    autoscaler = make(Wishes(4, 6), serve)
    await autoscaler.tick()
    assert serve.calls == []


async def test_the_loop_outlives_a_policy_that_raises_and_ends_when_closed(caplog):
    serve, policy = FakeServe(), Wishes(2, 1)
    policy.num_failures = 2
    autoscaler = make(policy, serve, interval_s=0.1)
    autoscaler.start()
    async with asyncio.timeout(10):
        await serve.resized.wait()
    await autoscaler.close()
    assert serve.targets[Role.PREFILL] == 2
    assert caplog.text.count("pools stay as they are") == 2
    num_decisions = len(autoscaler.history)
    await asyncio.sleep(0)
    assert len(autoscaler.history) == num_decisions


async def test_history_is_bounded():
    autoscaler = make(Wishes(1, 1), FakeServe(), num_history=3)
    for _ in range(5):
        await autoscaler.tick()
    assert [decision.signals.now for decision in autoscaler.history] == [2, 3, 4]


@pytest.mark.parametrize(
    ("section", "is_active"),
    [({}, False), ({"policy": "slo"}, True), ({"forecast": {"kind": "seasonal_naive"}}, True),
     ({"schedule": [{"at": "08:00", "until": "09:00"}]}, True)],
)  # fmt: skip
def test_nothing_scales_unless_it_is_asked_to(section, is_active):
    assert parse_config({"autoscaling": section}).autoscaling.is_active is is_active

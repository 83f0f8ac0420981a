"""Prompts that wait while a full step is to be computed before them get their plans when it is the last one."""

import asyncio

import pytest

from cluster import scheduler_service
from cluster.scheduler.admission import Admission
from cluster.scheduler_service import SchedulerService
from core.config import SchedulerConfig
from core.security import UNGUARDED
from simulator.traces.trace import Run, TracedRequest
from tests.cluster.test_who_goes_first import Fleet, decode_replica, report, request
from tests.simulator.adversity import h100_fleet, play


def test_it_is_known_when_to_look_again():
    """1000 tokens/s in steps of 512: of 1600 tokens a step is left after 1.088 s."""
    fleet = Fleet()
    fleet.ask(request("first", num_tokens=1600))
    assert fleet.plans() == ["first"]
    assert fleet.admission.take_held_until() == float("inf"), "nobody waits"
    fleet.ask(request("second"))
    assert fleet.plans(0.5) == []
    at = fleet.admission.take_held_until()
    assert at == pytest.approx(1.088, abs=0.01)
    assert fleet.plans(at) == ["second"]


async def test_a_scheduler_that_hears_nothing_gives_the_plan_then(monkeypatch):
    monkeypatch.setattr(scheduler_service, "HOUSEKEEPING_S", 60.0)
    admission = Admission(SchedulerConfig())
    service = SchedulerService(admission, "s", "127.0.0.1", UNGUARDED)
    await service.start()
    try:
        admission.report(report(decode_replica()), service._now())
        assert (await service.reserve(request("first", num_tokens=700))).decode.replica_id == "d0"
        async with asyncio.timeout(10):
            plan = await service.reserve(request("second"))
        assert plan.queue_s > 0.1
    finally:
        await service.close()


@pytest.mark.parametrize("num_tokens", [6000, 7000])
def test_the_twin_of_the_scheduler_does_too(num_tokens):
    """Housekeeping comes each 0.1 s, and nobody else tells it anything before the first prompt is computed."""
    fleet = h100_fleet(1, 1, prefill=None, report={"interval_s": 10.0, "quiet_interval_s": 10.0})
    requests = [
        TracedRequest(f"r{number}", 1.0, (Run(number, num_tokens),), (Run(number + 2, 1),), tenant="")
        for number in range(2)
    ]
    first, second = sorted(play(fleet, requests), key=lambda record: record.request_id)
    foreseen_s = {6000: 0.0827, 7000: 0.1285}[num_tokens]
    assert second.queued_s == pytest.approx(foreseen_s, abs=0.005)
    assert first.first_token_s > 1.005 + foreseen_s

"""A drain in any order of events: it refuses, finishes, hands over, comes to rest, and never stays for ever."""

import asyncio
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.drain import Drain, DrainOrder, DrainState, Held
from worker.drainer import Drainer

GRACE_S = 4.0


class DrainModel(RuleBasedStateMachine):
    """A replica that serves, is told to go any number of times, and may be looked at late or never."""

    def __init__(self) -> None:
        super().__init__()
        self.drain = Drain(GRACE_S)
        self.now = 0.0
        self.num_requests = self.num_moving = 0
        self.deadline = inf
        self.num_handed_over = self.num_hand_overs = 0

    @property
    def held(self) -> Held:
        return Held(self.num_requests, self.num_moving)

    @rule()
    def a_request_comes(self):
        assert self.drain.takes_work == (self.deadline == inf)
        if self.drain.takes_work:
            self.num_requests += 1

    @precondition(lambda self: self.num_requests)
    @rule(moves=st.booleans())
    def a_request_ends(self, moves):
        self.num_requests -= 1
        self.num_moving += moves  # its KV is still to be read

    @precondition(lambda self: self.num_moving)
    @rule()
    def something_comes_to_rest(self):
        self.num_moving -= 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(timeout_s=st.sampled_from([0.0, 1.0, 2.5, 8.0]))
    def told_to_go(self, timeout_s):
        self.drain.start(self.now, timeout_s)
        self.deadline = min(self.deadline, self.now + timeout_s)

    @precondition(lambda self: self.deadline < inf)
    @rule()
    def looked_at(self):
        order = self.drain.advance(self.held, self.now)
        if order is DrainOrder.HAND_OVER:
            assert self.now >= self.deadline, "before the deadline requests may finish"
            self.num_hand_overs += 1
            self.num_moving += self.num_requests
            self.num_requests = 0
            order = self.drain.advance(self.held, self.now)
            assert order is not DrainOrder.HAND_OVER
        if order is DrainOrder.END:
            assert not self.held or self.now >= self.deadline, "given up before its time"
        else:
            assert self.held, "nothing is held any more"
            assert self.now < self.deadline + GRACE_S, "stays for ever"
            assert self.now < self.drain.wake_at <= self.deadline + GRACE_S
        if self.now >= self.deadline:
            assert not self.num_requests

    @invariant()
    def books_agree(self):
        self.drain.validate()
        assert self.num_hand_overs <= 1


TestDrain = DrainModel.TestCase
TestDrain.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


def drain_of(*orders: tuple[Held, float], timeout_s: float = 10.0) -> list[DrainOrder]:
    drain = Drain(GRACE_S)
    drain.start(0.0, timeout_s)
    return [drain.advance(held, now) for held, now in orders]


def test_an_idle_replica_is_drained_at_once():
    assert drain_of((Held(0, 0), 0.0)) == ["end"]


def test_requests_finish_then_their_kv_is_read_then_it_ends():
    assert drain_of((Held(2, 0), 1.0), (Held(0, 2), 2.0), (Held(0, 1), 3.0), (Held(0, 0), 4.0)) == [
        "wait", "wait", "wait", "end",
    ]  # fmt: skip


def test_what_is_left_at_the_deadline_is_handed_over_once():
    assert drain_of((Held(2, 0), 9.9), (Held(2, 0), 10.0), (Held(0, 2), 10.0), (Held(0, 0), 10.5)) == [
        "wait", "hand over", "wait", "end",
    ]  # fmt: skip


def test_kv_that_nobody_reads_is_given_up_after_the_grace_and_not_only_after_the_deadline():
    assert drain_of((Held(0, 1), 1.0), (Held(0, 1), 4.9), (Held(0, 1), 5.0)) == ["wait", "wait", "end"]


@pytest.mark.parametrize(("second_s", "due_at"), [(3.0, 4.0), (60.0, 10.0)])
def test_a_second_drain_can_only_shorten(second_s, due_at):
    drain = Drain(GRACE_S)
    drain.start(0.0, 10.0)
    drain.start(1.0, second_s)
    assert drain.wake_at == due_at
    assert drain.advance(Held(1, 0), due_at - 0.1) is DrainOrder.WAIT
    assert drain.advance(Held(1, 0), due_at) is DrainOrder.HAND_OVER
    drain.start(due_at, 0.0)
    assert drain.state is DrainState.HANDING_OVER, "one that runs is not begun anew"


class Role:
    """One request that never ends by itself, and one share that is read when the test says so."""

    def __init__(self) -> None:
        self.held = Held(1, 1)
        self.num_handed_over = 0
        self.drainer = Drainer(30.0, lambda: self.held, self.hand_over)

    def hand_over(self) -> None:
        self.num_handed_over += 1
        self.held = Held(0, 1)

    def rest(self) -> None:
        self.held = Held(0, 0)
        self.drainer.changed()


async def test_a_drain_goes_on_when_the_caller_that_asked_for_it_is_lost():
    role = Role()
    first = asyncio.create_task(role.drainer.drain(60.0))
    await asyncio.sleep(0)
    assert role.drainer.is_draining and not role.drainer.is_drained
    first.cancel()
    await asyncio.wait([first])
    async with asyncio.timeout(5):
        second = asyncio.create_task(role.drainer.drain(0.0))
        while not role.num_handed_over:
            await asyncio.sleep(0)
        assert not role.drainer.is_drained, "KV is still being read"
        role.rest()
        await second
    assert role.drainer.is_drained and role.num_handed_over == 1
    await role.drainer.drain(0.0)

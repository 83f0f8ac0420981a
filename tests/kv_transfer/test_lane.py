"""Who serves a lane's jobs: its thread, or for short ones whoever submits them, and what becomes of failures."""

import threading
from collections.abc import Callable

import pytest

from core.errors import TransferFailed
from kv_transfer.channels.borrowed_time import BorrowedTime
from kv_transfer.channels.lane import Lane
from kv_transfer.channels.protocol import Passage

SOON = 5.0


class Wire:
    """A connection that only knows whether it was ended."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
def lane():
    wire = Wire()
    lane = Lane("a>b", lambda _: wire)
    lane.submit(passage, SOON).result(SOON)  # it is open
    yield lane
    lane.abort("over")
    assert wire.aborted.is_set()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("channel")] == []


def passage(wire: Wire, deadline: float) -> Passage:
    return Passage(1, 0.0, 0.0, 0.0)


def noting(threads: list[int]) -> Callable[[Wire, float], Passage]:
    def job(wire: Wire, deadline: float) -> Passage:
        threads.append(threading.get_ident())
        return passage(wire, deadline)

    return job


def test_a_short_job_on_an_idle_lane_is_done_when_submit_returns(lane):
    threads: list[int] = []
    assert lane.submit(noting(threads), SOON, is_short=True).done()
    assert threads == [threading.get_ident()]
    lane.submit(noting(threads), SOON).result(SOON)
    assert threads[-1] != threading.get_ident()


def test_a_short_job_waits_for_its_turn_behind_a_long_one(lane):
    may_end, order = threading.Event(), []

    def long(wire: Wire, deadline: float) -> Passage:
        assert may_end.wait(SOON)
        order.append("long")
        return passage(wire, deadline)

    def short(wire: Wire, deadline: float) -> Passage:
        order.append("short")
        return passage(wire, deadline)

    lane.submit(long, SOON)
    behind = lane.submit(short, SOON, is_short=True)
    assert not behind.done()
    may_end.set()
    behind.result(SOON)
    assert order == ["long", "short"]


def test_what_a_short_job_leaves_is_finished_by_the_thread_before_the_next_job(lane):
    threads: list[int] = []
    order: list[str] = []

    def begun(wire: Wire, deadline: float) -> Callable[[], Passage]:
        threads.append(threading.get_ident())

        def finish() -> Passage:
            order.append("finished")
            return noting(threads)(wire, deadline)

        return finish

    def next_one(wire: Wire, deadline: float) -> Passage:
        order.append("next")
        return passage(wire, deadline)

    first = lane.submit(begun, SOON, is_short=True)
    second = lane.submit(next_one, SOON, is_short=True)
    assert first.result(SOON).num_bytes == second.result(SOON).num_bytes == 1
    assert order == ["finished", "next"]
    assert threads[1] != threading.get_ident()


def test_a_short_job_that_fails_ends_the_lane_for_all(lane):
    def failing(wire: Wire, deadline: float) -> Passage:
        raise OSError("no such pool")

    failed = lane.submit(failing, SOON, is_short=True)
    with pytest.raises(TransferFailed, match="no such pool"):
        failed.result(SOON)
    assert not lane.is_open
    with pytest.raises(TransferFailed, match="no such pool"):
        lane.submit(passage, SOON, is_short=True).result(SOON)


def test_time_of_others_is_saved_up_to_a_limit_and_paid_back():
    time_left = BorrowedTime(share=0.25, most_s=2.0)
    assert time_left.is_left(100.0)
    time_left.spend(100.0, 101.5)
    assert time_left.is_left(101.5)  # half a second, and 0.375 saved meanwhile
    time_left.spend(101.5, 104.0)
    assert not time_left.is_left(104.0)  # 1.625 overdrawn, 0.625 saved
    assert not time_left.is_left(107.9)
    assert time_left.is_left(108.1)
    assert time_left.is_left(1000.0)
    time_left.spend(1000.0, 1002.5)
    assert time_left.is_left(1002.5), "no more than two seconds had been saved, and 0.625 more came"
    time_left.spend(1002.5, 1002.7)
    assert not time_left.is_left(1002.7)

"""Bytes between ports: shared evenly at each end, slowed by the way, cut off with a process."""

import pytest

from simulator.cost.cost_model import Link
from simulator.events import EventQueue
from simulator.network import Network


class Ports:
    def __init__(self, *speeds: float, latency_s: float = 0.5) -> None:
        self.queue = EventQueue()
        self.network = Network(self.queue, number=0)
        self.ended: dict[str, tuple[float, bool]] = {}
        for number, bytes_per_s in enumerate(speeds, start=1):
            self.network.add(number, Link(bytes_per_s, latency_s))

    def send(self, name: str, source: int, target: int, num_bytes: int, at: float = 0.0) -> None:
        def done(came: bool) -> None:
            self.ended[name] = self.queue.now, came

        self.queue.at(at, 1, source, self.network.send, source, target, num_bytes, done)

    def run(self) -> dict[str, tuple[float, bool]]:
        self.queue.run(lambda: True)
        assert len(self.network) == 0
        return self.ended


def test_one_transfer_takes_latency_and_bytes_over_the_slower_port():
    ports = Ports(100.0, 50.0)
    ports.send("a", 1, 2, 200)
    assert ports.run() == {"a": (4.5, True)}


def test_two_into_one_port_take_half_each_and_the_later_gets_it_all_when_the_first_is_done():
    ports = Ports(100.0, 100.0, 100.0)
    ports.send("a", 1, 3, 100)
    ports.send("b", 2, 3, 200)
    # until 2.5 s both go at 50, then b has 100 bytes left at 100
    assert ports.run() == {"a": (2.5, True), "b": (3.5, True)}


def test_what_joins_later_slows_from_then_on():
    ports = Ports(100.0, 100.0, 100.0, latency_s=0.0)
    ports.send("a", 1, 2, 200)
    ports.send("b", 1, 3, 100, at=1.0)
    assert ports.run() == {"a": (3.0, True), "b": (3.0, True)}


def test_opposite_directions_do_not_share():
    ports = Ports(100.0, 100.0, latency_s=0.0)
    ports.send("there", 1, 2, 100)
    ports.send("back", 2, 1, 100)
    assert ports.run() == {"there": (1.0, True), "back": (1.0, True)}


def test_a_slow_way_and_a_slow_port():
    ports = Ports(100.0, 100.0, 100.0, latency_s=0.0)
    ports.network.limit(1, 2, 0.1)
    ports.send("way", 1, 2, 100)
    ports.queue.at(20.0, 1, 0, ports.network.slow_down, 3, 0.5)
    ports.send("port", 2, 3, 100, at=19.5)
    assert ports.run() == {"way": (10.0, True), "port": (21.0, True)}


def test_what_leaves_or_enters_a_process_that_goes_does_not_come():
    ports = Ports(100.0, 100.0, 100.0, latency_s=0.0)
    ports.send("lost", 1, 3, 1000)
    ports.send("kept", 2, 3, 200)
    ports.queue.at(2.0, 1, 0, ports.network.cut, 1)
    ended = ports.run()
    assert ended["lost"] == (2.0, False)
    assert ended["kept"] == (pytest.approx(3.0), True)

"""Bytes on their way: booked, computed, counted by who receives them."""

from cluster.scheduler.flights import Flights
from core.messages.to_scheduler import LinkStatus


def counted(source: str, num_bytes: int) -> tuple[LinkStatus, ...]:
    return (LinkStatus(source, 1e9, num_bytes, 1),)


def test_what_the_receiver_counts_has_arrived_oldest_first():
    flights = Flights()
    flights.begin("a", "p0", "d0", 100)
    flights.begin("b", "p0", "d0", 50)
    flights.begin("c", "p0", "d1", 30)
    assert (flights.before("p0", "d9"), flights.before("p9", "d0")) == (180, 150)
    flights.heard("d0", counted("p0", 120), 2)
    assert (flights.before("p0", "d9"), flights.before("p9", "d0")) == (60, 30)
    flights.heard("d0", counted("p0", 120), 2)
    flights.end("b")
    assert (flights.before("p0", "d9"), flights.before("p9", "d0")) == (30, 0)


def test_a_first_token_is_no_arrival():
    flights = Flights()
    flights.begin("a", "p0", "d0", 100)
    flights.computed("a")
    flights.heard("d0", (), 1)
    assert flights.before("p0", "d0") == 100
    flights.heard("d0", (), 0)  # no handoff is open there any more: less was sent than was booked
    assert flights.before("p0", "d0") == 0


def test_a_prompt_that_is_still_computed_waits_for_its_link_whatever_is_open():
    flights = Flights()
    flights.begin("a", "p0", "d0", 100)
    flights.heard("d0", (), 0)
    assert flights.before("p0", "d0") == 100


def test_a_receiver_that_started_anew_counts_from_nothing():
    flights = Flights()
    flights.heard("d0", counted("p0", 1000), 0)
    flights.begin("a", "p0", "d0", 100)
    flights.heard("d0", counted("p0", 40), 1)
    assert flights.before("p0", "d0") == 60


def test_with_a_replica_its_flights_are_gone():
    flights = Flights()
    flights.begin("a", "p0", "d0", 100)
    flights.begin("b", "p1", "d0", 70)
    flights.lost("p0")
    assert (flights.before("p0", "d9"), flights.before("p9", "d0")) == (0, 70)
    flights.end("a")

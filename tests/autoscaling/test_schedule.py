"""Floors by the clock: weekdays, midnight, time zones, and the two nights when the clock changes."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from cluster.autoscaling.schedule import Schedule
from core.autoscaling_config import ScheduledFloor

BERLIN = ZoneInfo("Europe/Berlin")


def floor(moment: datetime, **window) -> tuple[float, float]:
    schedule = Schedule((ScheduledFloor(**({"prefill": 3, "decode": 5, "timezone": "Europe/Berlin"} | window)),))
    found = schedule.floor(moment)
    return found.prefill.num_replicas, found.decode.num_replicas


@pytest.mark.parametrize(
    ("local", "is_open"),
    [("2026-11-18 08:44", False), ("2026-11-18 08:45", True), ("2026-11-18 17:59", True), ("2026-11-18 18:00", False),
     ("2026-11-21 12:00", False), ("2026-11-22 12:00", False), ("2026-11-23 12:00", True)],
)  # fmt: skip
def test_office_hours(local, is_open):
    at = datetime.fromisoformat(local).replace(tzinfo=BERLIN)
    assert floor(at, at="08:45", until="18:00", days="mon-fri") == ((3, 5) if is_open else (0, 0))
    assert floor(at.astimezone(UTC), at="08:45", until="18:00", days="mon-fri") == ((3, 5) if is_open else (0, 0))


def test_the_same_hour_is_another_one_in_summer():
    window = {"at": "08:45", "until": "09:00"}
    assert floor(datetime(2026, 1, 15, 7, 50, tzinfo=UTC), **window) == (3, 5)
    assert floor(datetime(2026, 7, 15, 7, 50, tzinfo=UTC), **window) == (0, 0)
    assert floor(datetime(2026, 7, 15, 6, 50, tzinfo=UTC), **window) == (3, 5)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins():
    window = {"at": "22:00", "until": "02:00", "days": "fri"}
    assert floor(datetime(2026, 11, 20, 23, tzinfo=BERLIN), **window) == (3, 5)
    assert floor(datetime(2026, 11, 21, 1, 59, tzinfo=BERLIN), **window) == (3, 5)
    assert floor(datetime(2026, 11, 21, 23, tzinfo=BERLIN), **window) == (0, 0)
    assert floor(datetime(2026, 11, 20, 1, tzinfo=BERLIN), **window) == (0, 0)


def hours_open(first: datetime, **window) -> list[int]:
    """Minutes of UTC, from `first` over twelve hours, at which the floor begins and ends."""
    states = [
        floor(datetime.fromtimestamp(first.timestamp() + 60 * minute, UTC), **window)[0] > 0 for minute in range(720)
    ]
    return [minute for minute in range(1, 720) if states[minute] != states[minute - 1]]


def test_when_the_clock_goes_back_the_repeated_hour_is_inside_once_and_whole():
    """25 October 2026: 03:00 summer time (01:00 UTC) becomes 02:00; 02:30 comes at 00:30 and again at 01:30 UTC."""
    night = datetime(2026, 10, 24, 22, tzinfo=UTC)
    assert hours_open(night, at="02:30", until="04:00") == [150, 300]
    assert hours_open(night, at="01:00", until="02:30") == [60, 210]


def test_when_the_clock_goes_ahead_a_time_that_never_comes_is_read_early():
    """29 March 2026: 02:00 winter time (01:00 UTC) becomes 03:00; 02:30 would be 00:30 or 01:30 UTC."""
    night = datetime(2026, 3, 28, 22, tzinfo=UTC)
    assert hours_open(night, at="02:30", until="04:00") == [150, 240]


def test_the_largest_floor_wins_in_each_pool():
    windows = (
        ScheduledFloor(at="08:00", until="20:00", prefill=1, decode=6),
        ScheduledFloor(at="12:00", until="13:00", prefill=4, decode=2),
    )
    found = Schedule(windows).floor(datetime(2026, 11, 18, 12, 30, tzinfo=UTC))
    assert (found.prefill.num_replicas, found.decode.num_replicas) == (4, 6)
    assert found.prefill.reason == "scheduled from 12:00 to 13:00 UTC, mon-sun"

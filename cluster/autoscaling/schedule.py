"""Floors that people set by the clock: ready before the load comes."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cluster.autoscaling.signals import Demand, PoolDemand
from core.autoscaling_config import ScheduledFloor, parse_days, parse_time_of_day


class Schedule:
    """The largest floor of all windows that are open."""

    def __init__(self, floors: tuple[ScheduledFloor, ...]) -> None:
        self._windows = [_Window(floor) for floor in floors]

    def floor(self, wall: datetime) -> Demand:
        """At this moment, given with its time zone."""
        nothing = PoolDemand(0.0, "no floor is scheduled")
        is_open = [window.floor for window in self._windows if window.holds(wall)]
        prefill = max(is_open, key=lambda floor: floor.prefill, default=None)
        decode = max(is_open, key=lambda floor: floor.decode, default=None)
        return Demand(
            PoolDemand(prefill.prefill, _reason(prefill)) if prefill else nothing,
            PoolDemand(decode.decode, _reason(decode)) if decode else nothing,
        )


class _Window:
    """One floor, parsed once.

    Where a change of the clock makes a time of day happen twice or never, the window is the longer one of the two
    readings: a floor that comes an hour early costs less than one that comes late.
    """

    def __init__(self, floor: ScheduledFloor) -> None:
        self.floor = floor
        self._zone = ZoneInfo(floor.timezone)
        self._days = parse_days(floor.days)
        self._at, self._until = parse_time_of_day(floor.at), parse_time_of_day(floor.until)
        self._last_day = timedelta(days=0 if self._until > self._at else 1)

    def holds(self, wall: datetime) -> bool:
        """Whether the window that began today or yesterday, local time, is open."""
        today = wall.astimezone(self._zone).date()
        for day in (today, today - timedelta(days=1)):
            if day.weekday() in self._days:
                begins = min(self._moments(datetime.combine(day, self._at)))
                ends = max(self._moments(datetime.combine(day + self._last_day, self._until)))
                if begins <= wall < ends:
                    return True
        return False

    def _moments(self, local: datetime) -> list[datetime]:
        return [local.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1)]


def _reason(floor: ScheduledFloor) -> str:
    return f"scheduled from {floor.at} to {floor.until} {floor.timezone}, {floor.days}"

"""The `autoscaling` section: targets that size both pools, how fast sizes follow, what is known beforehand."""

from datetime import time
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator

from core.section import Section

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def parse_days(text: str) -> frozenset[int]:
    """Weekday numbers, Monday 0, of "mon-fri", "sat,sun" or "fri-mon,wed". Raises ValueError naming the bad part."""
    days: set[int] = set()
    for part in text.lower().replace(" ", "").split(","):
        first, _, last = part.partition("-")
        last = last or first
        if first not in WEEKDAYS or last not in WEEKDAYS:
            raise ValueError(f"{part!r} is no day or range of days; days are {', '.join(WEEKDAYS)}")
        start = WEEKDAYS.index(first)
        length = (WEEKDAYS.index(last) - start) % 7 + 1
        days |= {(start + i) % 7 for i in range(length)}
    return frozenset(days)


def parse_time_of_day(text: str) -> time:
    """A time of "08:45" or "8:45". Raises ValueError."""
    hours, _, minutes = text.partition(":")
    if not (hours.isdigit() and minutes.isdigit() and len(minutes) == 2 and int(hours) < 24 and int(minutes) < 60):
        raise ValueError(f"{text!r} is no time of day between 00:00 and 23:59")
    return time(int(hours), int(minutes))


class ScheduledFloor(Section):
    """At least so many replicas from `at` to `until` (the next day when that is not later) on these days."""

    at: str  # "08:45", on the clock of `timezone`
    until: str
    days: str = "mon-sun"  # days on which the window begins
    prefill: int = Field(default=0, ge=0)
    decode: int = Field(default=0, ge=0)
    timezone: str = "UTC"  # IANA name, say Europe/Berlin

    @field_validator("at", "until", mode="before")
    @classmethod
    def _is_time_of_day(cls, text: Any) -> Any:
        if not isinstance(text, str):  # YAML 1.1 reads 08:45 without quotes as text, but 12:30 as a number
            raise ValueError(f'write the time of day in quotes, as "08:45", not {text!r}')
        parse_time_of_day(text)
        return text

    @field_validator("days")
    @classmethod
    def _are_days(cls, text: str) -> str:
        parse_days(text)
        return text

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"{name!r} is no time zone of this system's database") from error
        return name


class ForecastConfig(Section):
    """A floor from the request rate of the last days; history lives in the autoscaler's memory."""

    kind: Literal["none", "seasonal_naive", "holt_winters"] = "none"  # holt_winters needs the extra `forecast`
    num_days: int = Field(default=3, ge=1)  # of history
    bin_s: int = Field(default=600, ge=10, le=21600)  # rates are averaged over bins of this length

    @field_validator("bin_s")
    @classmethod
    def _divides_a_day(cls, bin_s: int) -> int:
        if 86400 % bin_s:
            raise ValueError(f"a day of 86400 s is no multiple of {bin_s} s")
        return bin_s


class AutoscalingConfig(Section):
    """How many replicas each pool shall have. `min_replicas` and `max_replicas` stand in the pools' own sections."""

    policy: str = "fixed"  # "fixed" stays at min_replicas, "slo" follows load, "module:Class" is your own
    policy_options: dict[str, Any] = Field(default_factory=dict)  # for a policy of your own
    interval_s: float = Field(default=5.0, ge=0.1)  # between two decisions; a changed replica reports every 0.05 s
    max_gpus: float = Field(default=0.0, ge=0)  # of both pools together; 0 is no limit; without GPUs each rank is one

    ttft_target_s: float = Field(default=2.0, gt=0)  # prefill grows when the predicted TTFT stays above
    itl_target_s: float = Field(default=0.1, gt=0)  # decode grows when its step takes longer
    prefill_utilization: float = Field(default=0.7, gt=0, le=1)  # share of prefill's rate that steady traffic may take
    decode_batch_share: float = Field(default=0.75, gt=0, le=1)  # of max_num_seqs
    decode_kv_usage: float = Field(default=0.75, gt=0, le=1)  # of the blocks
    replica_start_s: float = Field(default=60.0, ge=0)  # until a new replica serves: how far ahead plans reach
    rate_window_s: float = Field(default=15.0, gt=0)  # time constant of the measured request rate

    dead_band: float = Field(default=0.1, ge=0, lt=1)  # demand this close to what stands changes nothing
    upscale_delay_s: float = Field(default=5.0, ge=0)  # demand must last this long
    downscale_delay_s: float = Field(default=300.0, ge=0)  # nothing that was needed within this time is given back
    downscale_step: int = Field(default=1, ge=1)  # replicas given back at a time
    downscale_pause_s: float = Field(default=30.0, ge=0)  # between two such steps

    schedule: tuple[ScheduledFloor, ...] = ()
    forecast: ForecastConfig = ForecastConfig()
    num_history: int = Field(default=720, ge=1)  # decisions that are remembered for plots

    @property
    def is_active(self) -> bool:
        """Whether anything may change a pool's size."""
        return self.policy != "fixed" or bool(self.schedule) or self.forecast.kind != "none"

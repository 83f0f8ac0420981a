"""What may befall a fleet, as a file describes it. Pure."""

from typing import Annotated, Literal

from pydantic import Field

from core.section import Section


class SlowReplica(Section):
    """From `at_s` on a replica computes at this share of its speed."""

    kind: Literal["slow_replica"]
    replica: str
    at_s: float = Field(default=0.0, ge=0)
    speed: float = Field(gt=0)


class SlowLink(Section):
    """From `at_s` on a replica's port, or the way to one other, has this share of its speed."""

    kind: Literal["slow_link"]
    replica: str
    to: str = ""  # empty: to and from everyone
    at_s: float = Field(default=0.0, ge=0)
    speed: float = Field(gt=0, le=1)


class LyingReplica(Section):
    """From `at_s` on a replica reports that it has nothing to do."""

    kind: Literal["lying_replica"]
    replica: str
    at_s: float = Field(default=0.0, ge=0)


class SkewedClock(Section):
    """A replica's clock is ahead by so much, from the start."""

    kind: Literal["skewed_clock"]
    replica: str
    offset_s: float


class DeadReplica(Section):
    """At `at_s` a replica's process ends; another takes its name `back_after_s` later, or nobody."""

    kind: Literal["dead_replica"]
    replica: str
    at_s: float = Field(default=0.0, ge=0)
    back_after_s: float | None = Field(default=None, ge=0)


class SchedulerRestart(Section):
    """At `at_s` the global scheduler's process ends; an empty one is there `down_s` later."""

    kind: Literal["scheduler_restart"]
    at_s: float = Field(default=0.0, ge=0)
    down_s: float = Field(default=2.0, ge=0)


class Burst(Section):
    """Requests of the trace that come within `over_s` after `at_s` come at once, at `at_s`."""

    kind: Literal["burst"]
    at_s: float = Field(default=0.0, ge=0)
    over_s: float = Field(gt=0)


Fault = Annotated[
    SlowReplica | SlowLink | LyingReplica | SkewedClock | DeadReplica | SchedulerRestart | Burst,
    Field(discriminator="kind"),
]

"""What requests may expect by class, and how tenants share the fleet."""

from typing import Literal

from pydantic import Field

from core.section import Section

SloClass = Literal["interactive", "standard", "batch"]


class SloTarget(Section):
    """Targets of one class of requests."""

    ttft_s: float = Field(gt=0)  # requests are due this long after they came; the first due go first
    itl_s: float = Field(gt=0)
    queue_timeout_s: float | None = Field(
        default=None, gt=0
    )  # longest wait for a plan; None: scheduler.queue_timeout_s


class SloConfig(Section):
    """Batch work fills what the other classes leave, makes room for them at once, and slows no batch of a replica
    beyond interactive's `itl_s`.
    """

    interactive: SloTarget = SloTarget(ttft_s=0.5, itl_s=0.05)
    standard: SloTarget = SloTarget(ttft_s=2.0, itl_s=0.1)
    batch: SloTarget = SloTarget(ttft_s=600.0, itl_s=1.0, queue_timeout_s=600.0)

    def target(self, slo_class: str) -> SloTarget:
        """Of a class by its name; a name of a newer version counts as standard."""
        found = getattr(self, slo_class) if slo_class in SloConfig.model_fields else self.standard
        assert isinstance(found, SloTarget)
        return found

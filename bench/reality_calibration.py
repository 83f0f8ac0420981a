"""What the twin is told of a real fleet: all of it measured while a load of its own was played, nothing tuned.

costs              fitted to the step times that replicas report (simulator/cost/measured_costs.py)
link               a line through the bytes and times of the transfers that they report
step_gap_s         mean time between tokens at the client, less the mean time of the steps that made them
control_latency_s  half of the mean round trip of a call that asks for nothing
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.reality_fleet import Played
from core.messages.fleet import Role
from core.messages.to_scheduler import Report, StepSample
from simulator.cost.cost_model import Link
from simulator.cost.measured_costs import LEAST_SAMPLES, MeasuredCosts, fit, fit_steps

LEAST_TRANSFERS = 8


@dataclass(frozen=True)
class Calibration:
    """See the module."""

    costs: dict[Role, MeasuredCosts]
    link: Link
    step_gap_s: float
    control_latency_s: float

    def describe(self) -> str:
        """One line."""
        costs, link = self.costs[Role.DECODE].costs, self.link
        return (
            f"decode steps {1e3 * costs.step_s:.1f} ms + {1e3 * costs.sequence_s:.2f} ms a sequence, chunks "
            f"{1e3 * costs.chunk_s:.1f} ms + {1e3 * costs.token_s:.3f} ms a token, gap {1e3 * self.step_gap_s:.2f} ms, "
            f"message {1e3 * self.control_latency_s:.2f} ms, transfer {1e3 * link.latency_s:.1f} ms"
        )


def calibrate(plays: Sequence[Played], before: Calibration | None = None) -> Calibration:
    """A role that computed little has the costs of all steps, since one engine serves both; of too few transfers the
    link is that of `before`. Raises ValueError when too little was seen.
    """
    samples: dict[Role, list[StepSample]] = {}
    transfers: list[tuple[int, float]] = []
    for play in plays:
        for _, event in play.events:
            if isinstance(event, Report):
                samples.setdefault(event.info.role, []).extend(event.steps)
                transfers += [(num_bytes, seconds) for _, num_bytes, seconds in event.transfers]
    every = [sample for found in samples.values() for sample in found]
    costs = {role: fit_steps(found if len(found) >= LEAST_SAMPLES else every) for role, found in samples.items()}
    link = before.link if before is not None and len(transfers) < LEAST_TRANSFERS else _link(transfers)
    return Calibration(costs, link, _step_gap_s(plays, samples[Role.DECODE]), _latency_s(plays))


def _link(transfers: Sequence[tuple[int, float]]) -> Link:
    if len(transfers) < LEAST_TRANSFERS:
        raise ValueError(f"{len(transfers)} transfers are too few to fit a link to")
    (latency_s, byte_s), ratios = fit([(1, num) for num, _ in transfers], [seconds for _, seconds in transfers])
    mean = fmean(ratios)  # the twin's link has no spread
    return Link(1 / max(byte_s * mean, 1e-12), latency_s * mean)


def _step_gap_s(plays: Sequence[Played], decode: Sequence[StepSample]) -> float:
    """Each token's step counts once on both sides; a request's first two tokens lie a handoff apart."""
    gaps = [gap for play in plays for seen in play.seen for gap in seen.gaps_s[1:]]
    num_tokens = sum(sample[2] for sample in decode)
    if not gaps or not num_tokens:
        raise ValueError("nothing was decoded")
    return max(0.0, fmean(gaps) - sum(sample[2] * sample[4] for sample in decode) / num_tokens)


def _latency_s(plays: Sequence[Played]) -> float:
    return fmean(seconds for play in plays for seconds in play.round_trips_s) / 2

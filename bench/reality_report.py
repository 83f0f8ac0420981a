"""What bench.reality compares: the same figures of a load on the real fleet and in the twin, and their ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from bench.reality_fleet import Seen
from bench.report import print_table
from simulator.fleet_spec import SloSection
from simulator.records import GapHistogram, Record
from simulator.summary import SHARES, Percentiles, percentiles
from simulator.twin import Result

WITHIN = 0.15
PERCENTS = tuple(f"p{round(100 * share)}" for share in SHARES)


@dataclass(frozen=True)
class Outcome:
    """A request in either world."""

    ttft_s: float
    tpot_s: float
    is_completed: bool
    is_local: bool
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True)
class Compared:
    """Of one load by figure: medians over the rounds, how far the real ones lie apart, ratios twin / real of rounds."""

    real: dict[str, float]
    twin: dict[str, float]
    real_spread: dict[str, tuple[float, float]]  # least and most, as shares of the median
    rounds: list[dict[str, float]]

    @property
    def ratios(self) -> dict[str, float]:
        """Twin / real; 1 where both are 0."""
        return _ratios(self.real, self.twin)

    @property
    def num_within(self) -> int:
        """Figures that agree within 15 %."""
        return sum(abs(ratio - 1) <= WITHIN for ratio in self.ratios.values())


def figures_of_real(seen: Sequence[Seen], slo: SloSection) -> dict[str, float]:
    """By name; times in seconds."""
    outcomes, gaps = list[Outcome](), GapHistogram()
    for one in seen:
        between = one.gaps_s
        gaps.add(np.array(between))
        tpot_s = sum(between) / len(between) if between else 0.0
        is_completed = not one.error and len(one.times) == one.traced.num_output_tokens
        ttft_s = one.ttft_s if one.times else float("inf")
        num_prompt = one.traced.num_prompt_tokens
        outcomes.append(Outcome(ttft_s, tpot_s, is_completed, not one.is_pair, num_prompt, one.num_cached))
    return _figures(outcomes, gaps, slo, max(one.traced.arrival_s for one in seen))


def figures_of_twin(result: Result, slo: SloSection) -> dict[str, float]:
    """By the same names."""
    outcomes = [_outcome(record) for record in result.records]
    return _figures(outcomes, result.gaps, slo, max(record.arrived_s for record in result.records))


def compare(real: Sequence[Mapping[str, float]], twin: Sequence[Mapping[str, float]]) -> Compared:
    """Of rounds that belong together."""
    rounds = [_ratios(one, other) for one, other in zip(real, twin, strict=True)]
    middle = _medians(real)
    spread = {
        name: (min(one[name] for one in real) / value, max(one[name] for one in real) / value) if value else (1.0, 1.0)
        for name, value in middle.items()
    }
    return Compared(middle, _medians(twin), spread, rounds)


def print_compared(title: str, foretold: Compared, retold: Compared) -> None:
    """One row for each figure, times in milliseconds: both twins beside the same real fleet."""
    told = ", ".join(f"{one.num_within} of {len(one.ratios)}" for one in (foretold, retold))
    print(f"\n{title}: figures within {WITHIN:.0%} of the real ones: {told}")
    rows = []
    for name, real in foretold.real.items():
        unit = 1e3 if name.endswith("ms") else 1.0
        row = [name, f"{unit * real:.3g}", "{:.2f} to {:.2f}".format(*foretold.real_spread[name])]
        for one in (foretold, retold):
            row += [f"{unit * one.twin[name]:.3g}", f"{one.ratios[name]:.2f}"]
        rows.append(row)
    print_table(("figure", "real", "of rounds", "foretold", "/ real", "retold", "/ real"), rows)
    print(flush=True)


def as_json(compared: Compared) -> dict[str, object]:
    """For the closing line."""
    return asdict(compared) | {"ratios": compared.ratios, "num_within": compared.num_within}


def _outcome(record: Record) -> Outcome:
    is_local = record.prefill == ""
    cached = record.num_prompt_tokens, record.num_cached_tokens
    return Outcome(record.ttft_s, record.tpot_s, record.is_completed, is_local, *cached)


def _figures(outcomes: Sequence[Outcome], gaps: GapHistogram, slo: SloSection, span_s: float) -> dict[str, float]:
    done = [one for one in outcomes if one.is_completed]
    good = sum(one.ttft_s <= slo.ttft_s and one.tpot_s <= slo.tpot_s for one in done)
    itl = Percentiles(*gaps.percentiles(SHARES))
    found: dict[str, float] = {"completed": float(len(done)), "goodput /s": good / span_s}
    for name, of in (
        ("TTFT", percentiles([one.ttft_s for one in done])),
        ("ITL", itl),
        ("TPOT", percentiles([one.tpot_s for one in done])),
    ):
        found |= {f"{name} {share} ms": value for share, value in zip(PERCENTS, asdict(of).values(), strict=True)}
    num_prompt = sum(one.num_prompt_tokens for one in done)
    found["cache hits"] = sum(one.num_cached_tokens for one in done) / max(1, num_prompt)
    found["local prefill"] = sum(one.is_local for one in done) / max(1, len(done))
    return found


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def _ratios(real: Mapping[str, float], twin: Mapping[str, float]) -> dict[str, float]:
    return {name: twin[name] / value if value else float(twin[name] == 0) or 9.99 for name, value in real.items()}

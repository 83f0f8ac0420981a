"""TTFT of measured runs, and times of disaggregated ones, as their benchmarks read them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulator.cost.apart_loop import ApartTimes, apart_times
from simulator.cost.closed_loop import TOKEN_BUDGET, LoopTimes
from simulator.cost.cost_model import StepWork
from simulator.cost.fit_engines import PUBLIC_BURST_SHARE, PUBLIC_LEAST_SIZE, loop_terms, replica_costs
from simulator.cost.gpu_cost_model import EngineOverhead
from simulator.cost.measured_runs import MeasuredRun

REQUEST_S = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16)
BURST_SHARES = tuple(np.linspace(0, 1, 41).tolist())

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Campaign:
    """How a group of runs was measured."""

    burst_share: float  # of a benchmark's requests, those that came at once in its beginning
    request_s: float
    least_size: float  # see LoopShape; told of public runs


@dataclass(frozen=True)
class Checked:
    """A run, and its times by how its requests' sizes are spread."""

    run: MeasuredRun
    _known: dict[float, LoopTimes] = field(default_factory=dict, init=False)

    def terms(self, least_size: float = 1.0) -> LoopTimes:
        """See `loop_terms`."""
        if least_size not in self._known:
            self._known[least_size] = loop_terms(self.run, least_size)
        return self._known[least_size]


def ttft_errors(checked: Sequence[Checked], weights: Floats, campaign: Campaign) -> list[float]:
    """Relative ones; `weights` are an engine's, see `as_weights`."""
    terms = (c.terms(campaign.least_size).ttft(campaign.burst_share) @ weights for c in checked)
    return [(float(s) + campaign.request_s) / c.run.ttft_s - 1 for s, c in zip(terms, checked, strict=True)]


def fit_campaign(checked: Sequence[Checked], weights: Floats) -> Campaign:
    """To the TTFT of runs that were measured alike: the least median of absolute errors."""
    campaigns = [
        Campaign(burst_share, request_s, least_size)
        for least_size in ((1.0,) if checked[0].run.is_public else (1.0, PUBLIC_LEAST_SIZE))
        for burst_share in BURST_SHARES
        for request_s in REQUEST_S
    ]
    return min(campaigns, key=lambda campaign: float(np.median(np.abs(ttft_errors(checked, weights, campaign)))))


def disaggregated_times(run: MeasuredRun, overhead: EngineOverhead) -> ApartTimes:
    """Of replicas as the run had them."""
    side = run.prefill
    assert side is not None
    size = (1 + PUBLIC_LEAST_SIZE) / 2 if run.is_public else 1.0
    prompt, output = round(size * run.num_prompt_tokens), round(size * run.num_output_tokens)
    prefill, decode = replica_costs(run, side.split, overhead), replica_costs(run, run.split, overhead)
    starts = range(0, prompt, TOKEN_BUDGET)
    prompt_s = sum(prefill.step_s(StepWork(((min(TOKEN_BUDGET, prompt - start), start),))) for start in starts)

    def step_s(num_decoding: float) -> float:
        low = int(num_decoding)
        low_s, high_s = (decode.step_s(StepWork((), num, num * (prompt + output // 2))) for num in (low, low + 1))
        return low_s + (num_decoding - low) * (high_s - low_s)

    return apart_times(run.num_clients, output, side.num_prefill, side.num_decode, prompt_s, step_s)


def mean_ttft_s(times: ApartTimes) -> float:
    """Mean TTFT, in seconds, where ten requests per client were sent."""
    return PUBLIC_BURST_SHARE * times.first_ttft_s + (1 - PUBLIC_BURST_SHARE) * times.later_ttft_s

"""What the cost model says of a measured run: its TPOT, and what its TTFT may be a sum of. Pure.

`weights` are an engine's, see `as_weights`; the parts of TTFT are those of `Campaign`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from simulator.cost.apart_loop import ApartTimes, apart_times
from simulator.cost.closed_loop import TOKEN_BUDGET, LoopTimes
from simulator.cost.cost_model import StepWork
from simulator.cost.fit_engines import PUBLIC_BURST_SHARE, PUBLIC_LEAST_SIZE, Floats, loop_terms, replica_costs
from simulator.cost.gpu_cost_model import EngineOverhead, GpuCostModel
from simulator.cost.measured_runs import MeasuredRun


class RunTimes(Protocol):
    """Of either mode."""

    @property
    def run(self) -> MeasuredRun:
        """The one that was measured."""
        ...

    def tpot_s(self, weights: Floats) -> float:
        """Mean over requests."""
        ...

    def ttft_terms(self, weights: Floats) -> Sequence[float]:
        """Seconds, but for the last."""
        ...


@dataclass(frozen=True)
class AggregatedTimes:
    """Of replicas that compute prompts beside what they decode."""

    run: MeasuredRun

    @cached_property
    def loop(self) -> LoopTimes:
        """See `loop_terms`."""
        return loop_terms(self.run)

    def tpot_s(self, weights: Floats) -> float:
        """See RunTimes."""
        return float(self.loop.tpot(PUBLIC_BURST_SHARE) @ weights)

    def ttft_terms(self, weights: Floats) -> Sequence[float]:
        """See RunTimes."""
        run = self.run
        first_s = float(self.loop.first_ttft @ weights)
        prompt_s = _prompt_s(replica_costs(run, run.split, _overhead(weights)), run.num_prompt_tokens)
        return _ttft_terms(run, first_s, prompt_s, self.tpot_s(weights))


@dataclass(frozen=True)
class DisaggregatedTimes:
    """Of replicas as the run had them."""

    run: MeasuredRun

    def apart(self, weights: Floats) -> ApartTimes:
        """See `apart_times`."""
        run, side, overhead = self.run, self.run.prefill, _overhead(weights)
        assert side is not None
        size = (1 + PUBLIC_LEAST_SIZE) / 2 if run.is_public else 1.0
        prompt, output = round(size * run.num_prompt_tokens), round(size * run.num_output_tokens)
        decode = replica_costs(run, run.split, overhead)
        prompt_s = _prompt_s(replica_costs(run, side.split, overhead), prompt)

        def step_s(num_decoding: float) -> float:
            low = int(num_decoding)
            low_s, high_s = (decode.step_s(StepWork((), num, num * (prompt + output // 2))) for num in (low, low + 1))
            return low_s + (num_decoding - low) * (high_s - low_s)

        return apart_times(run.num_clients, output, side.num_prefill, side.num_decode, prompt_s, step_s)

    def tpot_s(self, weights: Floats) -> float:
        """See RunTimes."""
        return self.apart(weights).tpot_s

    def ttft_terms(self, weights: Floats) -> Sequence[float]:
        """See RunTimes. Where prompts come no faster, their own times have the wait for those before in them."""
        times = self.apart(weights)
        return _ttft_terms(self.run, times.first_ttft_s, times.later_ttft_s, times.tpot_s)


def _overhead(weights: Floats) -> EngineOverhead:
    _, step_s, sequence_s = weights
    return EngineOverhead(float(step_s), float(sequence_s))


def _prompt_s(costs: GpuCostModel, num_tokens: int) -> float:
    """In steps of its own."""
    starts = range(0, num_tokens, TOKEN_BUDGET)
    return sum(costs.step_s(StepWork(((min(TOKEN_BUDGET, num_tokens - start), start),))) for start in starts)


def _ttft_terms(run: MeasuredRun, first_s: float, prompt_s: float, tpot_s: float) -> Sequence[float]:
    return first_s, prompt_s, run.num_output_tokens * tpot_s / run.num_clients, 1.0, float(run.num_clients)

"""Two numbers of an engine's overhead, fitted to measured TPOT; kernels take what they were measured to take. Pure.

    TPOT = kernels + step_s + sequence_s * sequences

Errors count by Cauchy's loss of SCALE, that is little more when they are large: the fit finds what most runs agree in,
however far off the others are. Such a loss has several minima; the search starts from STARTS and takes the least.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from simulator.cost.closed_loop import LoopShape, LoopTimes, loop_times
from simulator.cost.cost_model import StepWork
from simulator.cost.gpu_cost_model import EngineOverhead, GpuCostModel
from simulator.cost.gpu_spec import gpu_spec
from simulator.cost.least_squares import not_negative
from simulator.cost.measured_runs import MeasuredRun, Split
from simulator.cost.models import served_model

PUBLIC_LEAST_SIZE = 0.8  # of InferenceMAX's requests, see MeasuredRun
PUBLIC_BURST_SHARE = 0.1
ENGINES_THAT_PREFER_PROMPTS = ("sglang",)  # by their defaults
SCALE = 0.05  # relative
STARTS = tuple(product((0.0, 1e-3, 2e-3, 4e-3), (0.0, 2e-5, 5e-5)))  # step_s, sequence_s
NUM_ROUNDS = 40
TINY = 1e-9

Floats = NDArray[np.float64]


def replica_costs(run: MeasuredRun, split: Split, overhead: EngineOverhead) -> GpuCostModel:
    """One replica of a run."""
    gpu, model = gpu_spec(run.gpu), served_model(run.model)
    ranks = split.tensor_parallel, run.precision, overhead, split.expert_parallel, split.data_parallel
    return GpuCostModel(gpu, model, *ranks)


def loop_terms(run: MeasuredRun) -> LoopTimes:
    """TTFT and TPOT as what they are the sums of: [kernels' seconds, steps, sequences in steps]."""
    costs = replica_costs(run, run.split, EngineOverhead())

    def terms(work: StepWork) -> tuple[float, float, float]:
        return costs.step_s(work), 1.0, float(len(work.chunks) + work.num_decoding)

    sizes = PUBLIC_LEAST_SIZE if run.is_public else 1.0
    prompts_first = run.engine in ENGINES_THAT_PREFER_PROMPTS
    shape = LoopShape(run.num_clients, run.num_prompt_tokens, run.num_output_tokens, sizes, prompts_first)
    return loop_times(shape, terms)


def as_weights(overhead: EngineOverhead) -> Floats:
    """Of `loop_terms`."""
    return np.array([1.0, overhead.step_s, overhead.sequence_s])


def fit_overhead(runs: Sequence[MeasuredRun], terms: Sequence[LoopTimes]) -> EngineOverhead:
    """To the TPOT of runs of one engine, aggregated."""
    tpots = np.array([run.tpot_s for run in runs])
    relative = np.array([times.tpot(PUBLIC_BURST_SHARE) for times in terms]) / tpots[:, None]
    minima = [_minimum(relative[:, 0], relative[:, 1:], np.array(start)) for start in STARTS]
    _, step_s, sequence_s = min(minima)
    return EngineOverhead(step_s, sequence_s)


def _minimum(kernels: Floats, rest: Floats, found: Floats) -> tuple[float, float, float]:
    """Loss, step_s and sequence_s where predicted = kernels + rest @ these is near 1 in each row: least squares of
    predicted - 1, weighted anew in each round so that they fall where the loss of log(predicted) does.
    """
    scale = rest.max(axis=0)
    for _ in range(NUM_ROUNDS):
        predicted = kernels + rest @ found
        logs, off = np.log(predicted), predicted - 1
        slopes = np.divide(logs, off * predicted, out=np.ones_like(off), where=np.abs(off) > TINY)
        weights = np.sqrt(slopes / (1 + (logs / SCALE) ** 2))
        found = not_negative(rest / scale * weights[:, None], (1 - kernels) * weights) / scale
    errors = np.log(kernels + rest @ found) / SCALE
    return float(np.log1p(errors**2).sum()), float(found[0]), float(found[1])

"""Steps as a fleet of one's own was measured: fitted to the samples that its replicas report, spread included. Pure.

    seconds = (coefficients . what the step computes) * one of the ratios observed / fitted that samples had

Which ratio a step gets depends on its work alone, as if drawn: two runs agree to the bit, and many steps have together
the mean and the tails of those that were measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.scheduler.step_costs import StepCosts, num_pairs
from core.messages.to_scheduler import StepSample
from simulator.cost.cost_model import StepWork

LEAST_SAMPLES = 20  # of one kind of steps, before a line is put through them
NUM_RATIOS = 512  # quantiles that are kept of the ratios
ROUNDS = 8  # of weighing outliers down
CLIP = 2.0  # mean deviations beyond which a sample's pull grows no more
LEAST_DEVIATION = 1e-6  # relative
MASK = 2**32 - 1
NO_SPREAD = (1.0,)

Floats = NDArray[np.float64]
Number = TypeVar("Number", int, NDArray[np.int64])


@dataclass(frozen=True)
class MeasuredCosts:
    """Implements CostModel. The ratios are of steps with parts of prompts in them, and of those that only decode."""

    costs: StepCosts
    chunk_ratios: tuple[float, ...] = NO_SPREAD
    decode_ratios: tuple[float, ...] = NO_SPREAD

    def step_s(self, work: StepWork) -> float:
        """See CostModel."""
        num_decoding, costs = work.num_decoding, self.costs
        if not work.chunks:
            fitted_s = costs.decode_step_s(num_decoding, work.num_kv_tokens + num_decoding)
            ratios, place = self.decode_ratios, _scattered(num_decoding, work.num_kv_tokens)
        else:
            num_tokens = sum(num for num, _ in work.chunks)
            pairs = int(sum(num_pairs(num, before) for num, before in work.chunks))
            features = 1, num_tokens + num_decoding, pairs, work.num_kv_tokens + num_decoding
            fitted_s = sum(c * x for c, x in zip(costs.of_chunks, features, strict=True))
            ratios, place = self.chunk_ratios, _scattered(num_tokens, pairs + work.num_kv_tokens)
        return fitted_s * ratios[place % len(ratios)]

    def decode_steps_s(self, num_decoding: int, num_kv_tokens: NDArray[np.int64]) -> Floats:
        """See CostModel."""
        costs, ratios = self.costs, np.array(self.decode_ratios)
        fitted_s = costs.step_s + costs.sequence_s * num_decoding + costs.context_s * (num_kv_tokens + num_decoding)
        steps_s: Floats = fitted_s * ratios[_scattered(num_decoding, num_kv_tokens) % len(ratios)]
        return steps_s


def fit_steps(samples: Iterable[StepSample]) -> MeasuredCosts:
    """Of the steps of replicas that are alike. Raises ValueError when too few of them decode.

    Without enough steps that compute prompts their costs are those of decoding, token by token.
    """
    chunks, decodes = list[tuple[int, ...]](), list[tuple[int, ...]]()
    chunks_s, decodes_s = list[float](), list[float]()
    for num_tokens, pairs, num_decoding, num_kv_tokens, seconds in samples:
        if seconds <= 0:
            continue
        if num_tokens:
            chunks.append((1, num_tokens + num_decoding, pairs, num_kv_tokens))
            chunks_s.append(seconds)
        elif num_decoding:
            decodes.append((1, num_decoding, num_kv_tokens))
            decodes_s.append(seconds)
    if max(len(chunks), len(decodes)) < LEAST_SAMPLES:
        raise ValueError(f"{len(chunks)} steps with prompts and {len(decodes)} without are too few to fit costs to")
    prompt, chunk_ratios = fit(chunks, chunks_s) if len(chunks) >= LEAST_SAMPLES else (None, NO_SPREAD)
    decode, decode_ratios = fit(decodes, decodes_s) if len(decodes) >= LEAST_SAMPLES else (None, NO_SPREAD)
    if decode is None:  # a replica that only computes prompts
        assert prompt is not None
        decode = (prompt[0], prompt[1], prompt[3])
    if prompt is None:
        prompt = (decode[0], decode[1], decode[2], decode[2])
    return MeasuredCosts(StepCosts(*prompt, *decode), chunk_ratios, decode_ratios)


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients, none negative, and quantiles of the ratios observed / fitted.

    Least squares of relative errors, with the pull of outliers bounded as by Huber (1964), reweighted in rounds;
    features whose coefficients would be negative are left out, the worst one first.
    """
    rows, observed = np.array(features, dtype=np.float64), np.array(seconds, dtype=np.float64)
    kept = [column for column in range(rows.shape[1]) if np.any(rows[:, column])]
    while True:
        found = _robust(rows[:, kept] / observed[:, None])
        worst = int(np.argmin(found))
        if found[worst] >= 0 or len(kept) == 1:
            break
        del kept[worst]
    coefficients = np.zeros(rows.shape[1])
    coefficients[kept] = np.maximum(found, 0.0)
    ratios = observed / (rows @ coefficients)
    shares = (np.arange(NUM_RATIOS) + 0.5) / NUM_RATIOS
    return tuple(coefficients.tolist()), tuple(np.quantile(ratios, shares).tolist())


def _robust(relative: Floats) -> Floats:
    """The c for which relative @ c is nearest to 1."""
    weights: Floats = np.ones(len(relative))
    found: Floats = np.zeros(relative.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        found = np.asarray(np.linalg.lstsq(relative * root[:, None], root, rcond=None)[0], dtype=np.float64)
        off = np.abs(relative @ found - 1)
        reach = CLIP * max(LEAST_DEVIATION, float(np.mean(np.minimum(off, np.quantile(off, 0.9)))))
        weights = np.minimum(1.0, reach / np.maximum(off, LEAST_DEVIATION))
    return found


def _scattered(first: int, second: Number) -> Number:
    """A number that looks random, the same for the same two; all steps stay below 2**63 for second below 2**31."""
    mixed = ((first * 0x9E3779B1 & MASK) + second * 0x85EBCA6B) & MASK
    mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & MASK
    return mixed ^ (mixed >> 16)

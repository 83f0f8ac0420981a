"""What a benchmark adds to the times of its runs, as its TTFT tells. Pure.

A benchmark of N clients begins with N requests at once. Later ones come as others end, T / N apart, where a request
takes T to decode. No row tells how many of its requests were the first ones, whether an engine had a place for each
client, and what a request and a client cost outside of steps:

    TTFT = burst_share * TTFT(first ones) + num_prompts * own prompt + num_without_place * T / N
           + request_s + client_s * N

These five, none negative, are fitted to runs that were measured alike, and say something of others of theirs alone.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np

from simulator.cost.fit_engines import Floats
from simulator.cost.least_squares import not_negative
from simulator.cost.measured_runs import MeasuredRun
from simulator.cost.run_times import RunTimes

NUM_ROUNDS = 60
LEAST_ERROR = 0.02  # smaller ones count as squares


class Campaign(NamedTuple):
    """How a group of runs was measured."""

    burst_share: float  # of a benchmark's requests, those that came at once in its beginning
    num_prompts: float  # that a later request waits for, its own with them, in times of its own
    num_without_place: float  # clients, on average, that wait until another one's request has ended
    request_s: float
    client_s: float


def fit_campaign(times: Sequence[RunTimes], weights: Floats) -> Campaign:
    """To runs that were measured alike, under an engine of these `weights`: about the least sum of absolute relative
    errors, by least squares weighted anew in each round; of all rounds the one with the least median.
    """
    relative = _relative(times, weights)
    scale = relative.max(axis=0)
    found, least = np.zeros(len(scale)), np.inf
    roots = np.ones(len(times))
    for _ in range(NUM_ROUNDS):
        solved = not_negative(relative / scale * roots[:, None], roots) / scale
        errors = np.abs(relative @ solved - 1)
        roots = 1 / np.sqrt(np.maximum(errors, LEAST_ERROR))
        if np.median(errors) < least:
            found, least = solved, float(np.median(errors))
    return Campaign(*found.tolist())


def ttft_errors(times: Sequence[RunTimes], weights: Floats, campaign: Campaign) -> list[float]:
    """Relative ones."""
    return [float(ratio) - 1 for ratio in _relative(times, weights) @ np.array(campaign)]


def held_out_errors(times: Sequence[RunTimes], weights: Floats) -> list[float]:
    """Of each half of the runs' shapes by the campaign that the other half shows; none where there is but one shape."""
    first, second = shape_halves(times)
    if not first or not second:
        return []
    pairs = (first, second), (second, first)
    return [error for known, others in pairs for error in ttft_errors(others, weights, fit_campaign(known, weights))]


def shape_halves(times: Sequence[RunTimes]) -> tuple[list[RunTimes], list[RunTimes]]:
    """Runs of one shape of load are in one half, so that neither knows of any that the other has."""
    half_of = dict(zip(sorted({_shape(one.run) for one in times}), cycle((0, 1)), strict=False))
    first, second = ([one for one in times if half_of[_shape(one.run)] == half] for half in (0, 1))
    return first, second


def _shape(run: MeasuredRun) -> tuple[int, int, int]:
    return run.num_clients, run.num_prompt_tokens, run.num_output_tokens


def _relative(times: Sequence[RunTimes], weights: Floats) -> Floats:
    return np.array([[term / one.run.ttft_s for term in one.ttft_terms(weights)] for one in times])

"""The load of bench.reality: Poisson arrivals, mixed lengths, half of the prompts behind a common prefix."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp, log
from random import Random

from simulator.traces.trace import Run, TracedRequest, own_token, split_at

NUM_PREFIXES = 6
PREFIX_TOKENS = 160
PREFIX_SHARE = 0.5
PROMPT_TOKENS = (24, 512)  # drawn evenly in their logarithm, without the prefix
OUTPUT_TOKENS = (8, 64)


def poisson_load(num_requests: int, per_s: float, seed: int) -> list[TracedRequest]:
    """The same for the same seed."""
    chance, now = Random(seed), 0.0
    load = []
    for index in range(num_requests):
        now += chance.expovariate(per_s)
        own = own_token(index)
        prefix = Run(1 + chance.randrange(NUM_PREFIXES), PREFIX_TOKENS)
        before = (prefix,) if chance.random() < PREFIX_SHARE else ()
        prompt = (*before, Run(own, _log_uniform(chance, *PROMPT_TOKENS)))
        output = (Run(own, _log_uniform(chance, *OUTPUT_TOKENS)),)
        load.append(TracedRequest(f"poisson-{index}", now, prompt, output))
    return load


def fitted(trace: Sequence[TracedRequest], longest: int, per_s: float) -> list[TracedRequest]:
    """A recorded trace for a small model: the lengths of its longest request become those of the model's context, all
    others shrink by the same share, and arrivals come at this rate.
    """
    share = min(1.0, (longest - 1) / max(one.num_prompt_tokens + one.num_output_tokens for one in trace))
    span_s = trace[-1].arrival_s - trace[0].arrival_s
    pace = (len(trace) - 1) / span_s / per_s if span_s else 0.0
    return [
        replace(
            one,
            arrival_s=(one.arrival_s - trace[0].arrival_s) * pace,
            prompt=_shrunk(one.prompt, share),
            output=split_at(one.output, max(1, int(one.num_output_tokens * share)))[0],
        )
        for one in trace
    ]


def spell(runs: Iterable[Run], vocab_size: int, play: int) -> list[int]:
    """Tokens that a model knows, equal where the runs are: each id stands for an endless text of its own, another one
    in each play, so that none finds what an earlier one left in the caches.
    """
    return [
        token
        for run in runs
        for token_id in range(run.first, run.first + run.number)
        for token in Random(f"{play} {token_id}").choices(range(vocab_size), k=run.length)
    ]


def _shrunk(runs: Iterable[Run], share: float) -> tuple[Run, ...]:
    """Each id's length by itself, so that common prefixes stay common; at least one token."""
    return tuple(Run(run.first, max(1, int(run.length * share)), run.number) for run in runs)


def _log_uniform(chance: Random, least: int, most: int) -> int:
    return round(exp(chance.uniform(log(least), log(most))))

"""Traces whose prompts are lists of block ids, chained by prefix: Mooncake's, and ShareGPT's in the same form. Pure."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from random import Random
from statistics import median
from typing import Annotated

from pydantic import Field

from simulator.traces.trace import MOST_TOKENS, OWN_TOKENS, Run, TracedRequest, blocks, own_token, runs_of_blocks

HUB_CHILDREN = 16  # a block that more different blocks follow is a system prompt's: many sessions begin with it

NumTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


@dataclass(frozen=True, slots=True)
class Row:
    """A line, guarded by pydantic where it is read."""

    timestamp: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # ms
    input_length: NumTokens
    output_length: NumTokens
    hash_ids: list[Annotated[int, Field(ge=0, lt=OWN_TOKENS)]]


def read_block_ids(rows: Sequence[Row], random: Random) -> Iterator[TracedRequest]:
    """Timestamps that tick, many requests to a tick, are spread evenly over it. Raises ValueError."""
    if not rows:
        return
    block_size = _block_size(rows)
    tick_s = _tick_s([row.timestamp / 1000 for row in rows])
    hubs = _hubs(rows)
    first_s = min(row.timestamp for row in rows) / 1000
    for number, row in enumerate(rows):
        own = own_token(number)
        ids = row.hash_ids
        yield TracedRequest(
            f"blocks-{number}",
            row.timestamp / 1000 - first_s + random.random() * tick_s,
            runs_of_blocks(blocks(ids, block_size), row.input_length, own),
            (Run(own, row.output_length),),
            session=_session(ids, hubs),
        )


def _block_size(rows: Sequence[Row]) -> int:
    """The power of two that is nearest to tokens per id."""
    each = [row.input_length / len(row.hash_ids) for row in rows if len(row.hash_ids) > 3]
    if not each:
        raise ValueError("no line has the more than 3 hash_ids that tell how many tokens a block has")
    return int(2 ** max(0, round(log2(median(each)))))


def _tick_s(times_s: Sequence[float]) -> float:
    """Between neighbouring times, where most requests share theirs with others; else 0."""
    different = sorted(set(times_s))
    if len(different) < 2 or len(different) > len(times_s) / 2:
        return 0.0
    return min(later - earlier for earlier, later in pairwise(different))


def _hubs(rows: Sequence[Row]) -> set[int]:
    children: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        for before, after in pairwise(row.hash_ids):
            children[before].add(after)
    return {block for block, found in children.items() if len(found) > HUB_CHILDREN}


def _session(ids: Sequence[int], hubs: set[int]) -> str:
    """By the first block that sets a session apart from the others."""
    return next((f"session-{block}" for block in ids if block not in hubs), "")

"""What prompts of a line leave each other to compute: what several have in common is computed once. Pure."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from core.block_hash import BlockHash, num_common


class Prompt(NamedTuple):
    """One that waits; `num_cached` of its blocks somebody has."""

    hashes: Sequence[BlockHash]
    num_tokens: int
    num_cached: int


class Left(NamedTuple):
    """Tokens of a prompt that are left to compute when all before it in the line have been served."""

    num_own: int
    num_for_others: int = 0  # beside these: who comes behind it needs them, too


def left_by_line(prompts: Iterable[Prompt], block_size: int) -> list[Left]:
    """In their order. Of prompts that begin alike the first has the common part to compute, as far as with it."""
    found: list[Left] = []
    first_of: dict[BlockHash, tuple[int, Prompt]] = {}  # by the first block that nobody has
    for number, prompt in enumerate(prompts):
        hashes, _, depth = prompt
        num_common_blocks = 0
        if depth < len(hashes):
            first_number, first = first_of.setdefault(hashes[depth], (number, prompt))
            if first_number != number:
                num_common_blocks = num_common(first.hashes, hashes, depth + 1) - depth
                found[first_number] = _for_others(
                    first, found[first_number], num_common_blocks * block_size, block_size
                )
        num_uncached = prompt.num_tokens - (depth + num_common_blocks) * block_size
        found.append(Left(max(1, num_uncached)))
    return found


def _for_others(first: Prompt, left: Left, num_shared: int, block_size: int) -> Left:
    num_uncached = first.num_tokens - first.num_cached * block_size
    num_for_others = min(num_uncached - 1, max(left.num_for_others, num_shared))
    return Left(num_uncached - num_for_others, num_for_others)

"""KV groups: layers that keep KV of the same tokens, and share one pool of equal blocks with the other groups. Pure.

Layers with a sliding window need the last tokens alone, the others all. A block of the pool holds S tokens of one
group; each of its layers has a place in it, and all groups have as many places, so that any block can serve any group:

    7 layers, windows  [ w w w - w w w ]      - : none, all tokens
    3 places           group 0 [ 3 . . ]      . : padding
                       group 1 [ 0 2 5 ]
                       group 2 [ 1 4 6 ]

Layers are dealt out in turn, so that any stretch of the model, a stage of a pipeline, has its share of every group.

The published relatives are vLLM's hybrid KV cache manager, whose groups have as many places as its smallest kind has
layers, and Jenga (Zhang et al., 2025), whose pages are a common multiple of what the kinds need.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.block_hash import BlockHash, BlockKey, in_group

LogicalBlock = tuple[int, int]  # of a sequence: the number of its KV group, and its own number there

MOST_PADDING = 1 / 8  # of the places of all groups, and of those of groups without a window, which long contexts fill


@dataclass(frozen=True)
class KVGroup:
    """`layers` are the model's, ascending: the first has place 0. `window` as in AttentionSpec; None: all tokens."""

    layers: tuple[int, ...]
    window: int | None = None

    def first_needed(self, num_tokens: int, block_size: int) -> int:
        """The first logical block that a token sees which follows `num_tokens` others; those before are behind it."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // block_size

    def most_at_once(self, num_tokens: int, block_size: int) -> int | None:
        """Blocks that steps of at most `num_tokens` tokens of a sequence need at a time; None: all."""
        return None if self.window is None else -(-(self.window - 1 + num_tokens) // block_size) + 1

    def reach(self, block_size: int) -> int | None:
        """Blocks before a block's first token that this token sees; None: all."""
        return None if self.window is None else max(1, -(-(self.window - 1) // block_size))

    def places(self, layers: range) -> range:
        """Where those of the group's layers lie that are among `layers`."""
        return range(bisect_left(self.layers, layers.start), bisect_left(self.layers, layers.stop))


def places_of(groups: Sequence[KVGroup]) -> dict[int, tuple[int, int]]:
    """(number of its group, place), by layer."""
    return {layer: (number, place) for number, group in enumerate(groups) for place, layer in enumerate(group.layers)}


def group_layers(windows: Sequence[int | None]) -> tuple[KVGroup, ...]:
    """The groups of a model, given each layer's window: those without one first, then larger windows before smaller.

    Layers of one window are dealt out to as few groups of p places as hold them. Of all p whose padding keeps within
    MOST_PADDING, that with the fewest groups is taken, then the one with the least padding, then the largest.
    """
    kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
    layers = {kind: [layer for layer, window in enumerate(windows) if window == kind] for kind in kinds}
    num_places = min(range(1, len(windows) + 1), key=lambda p: _cost([*layers.values()], len(layers.get(None, ())), p))
    return tuple(
        KVGroup(tuple(found[number::num_groups]), kind)
        for kind, found in layers.items()
        for num_groups in [-(-len(found) // num_places)]
        for number in range(num_groups)
    )


def _cost(kinds: list[list[int]], num_full: int, num_places: int) -> tuple[bool, int, int, int]:
    """What speaks against a number of places, gravest first."""
    num_groups = sum(-(-len(found) // num_places) for found in kinds)
    wasted = num_groups * num_places - sum(map(len, kinds))
    wasted_full = -num_full % num_places
    is_too_much = wasted > MOST_PADDING * num_groups * num_places or wasted_full > MOST_PADDING * (
        num_full + wasted_full
    )
    return is_too_much, num_groups, wasted, -num_places


def chain_key(hashes: Sequence[BlockHash], number: int, group: KVGroup, block: int) -> tuple[BlockKey, BlockKey | None]:
    """A full block's key in a group of this number, and that of the block without which it is of no use.

    There is none where a window is: its last blocks serve without those before them.
    """
    has_parent = block > 0 and group.window is None
    return in_group(hashes[block], number), in_group(hashes[block - 1], number) if has_parent else None


def needed_behind(
    groups: Sequence[KVGroup], hashes: Sequence[BlockHash], depth: int, block_size: int
) -> list[tuple[BlockKey, BlockKey | None]]:
    """The chain keys of what a sequence needs to go on behind its first `depth` blocks, by group."""
    return [
        chain_key(hashes, number, group, block)
        for number, group in enumerate(groups)
        for block in range(group.first_needed(depth * block_size, block_size), depth)
    ]


def deepest_prefix(
    reaches: Sequence[int | None], hashes: Sequence[BlockHash], is_cached: Callable[[BlockKey], bool]
) -> int:
    """The largest number of leading blocks behind which a sequence can go on with what is cached.

    `reaches`, by group, as KVGroup.reach says: all of these blocks, or the last ones that a window reaches back to.
    """
    if all(reach is None for reach in reaches):
        return _num_leading(hashes, len(reaches), is_cached)
    deepest, runs = 0, [0] * len(reaches)  # of consecutive cached blocks, up to this one
    for depth, block_hash in enumerate(hashes, start=1):
        for number, reach in enumerate(reaches):
            runs[number] = runs[number] + 1 if is_cached(in_group(block_hash, number)) else 0
            if reach is None and not runs[number]:
                return deepest
        if all(run >= needed_run(reach, depth) for run, reach in zip(runs, reaches, strict=True)):
            deepest = depth
    return deepest


def _num_leading(hashes: Sequence[BlockHash], num_groups: int, is_cached: Callable[[BlockKey], bool]) -> int:
    """Blocks cached in every group, up to the first that is not."""
    for depth, block_hash in enumerate(hashes):
        for number in range(num_groups):
            if not is_cached(in_group(block_hash, number)):
                return depth
    return len(hashes)


def needed_run(reach: int | None, depth: int) -> int:
    """How many of the last of `depth` blocks must be cached."""
    return depth if reach is None else min(reach, depth)

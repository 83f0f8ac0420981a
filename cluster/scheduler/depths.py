"""How deep each replica matches a prompt, given who holds which of its blocks. Pure."""

from collections.abc import Sequence

from cluster.scheduler.matches import Run, Segment

Reaches = tuple[int | None, ...]  # by KV group, see core.kv_groups.KVGroup.reach


def nested(runs: Sequence[Run], alike: int) -> list[Segment]:
    """Of one group without a window: whoever holds a block counts as long as it holds all before it."""
    segments: list[Segment] = []
    alive, depth = alike, 0
    for run in runs:
        if run.start != depth:
            break
        still = alive & run.holders.everyone
        if gone := alive & ~still:
            segments.append(Segment(depth, gone))
        alive, depth = still, depth + run.length
        if not alive:
            break
    if alive:
        segments.append(Segment(depth, alive))
    return [segment for segment in segments if segment.depth]


def by_windows(groups: Sequence[Sequence[Run]], reaches: Reaches, alike: int, num_blocks: int) -> list[Segment]:
    """Of any groups: the deepest block behind which a replica has what every group's reach asks for."""
    able = [alike] * num_blocks  # bits by depth - 1
    for runs, reach in zip(groups, reaches, strict=True):
        held = [0] * num_blocks
        for run in runs:
            held[run.start : run.start + run.length] = [run.holders.everyone] * run.length
        able = [a & b for a, b in zip(able, _all_of_last(held, num_blocks if reach is None else reach), strict=True)]
    segments: list[Segment] = []
    found = 0
    for depth in range(num_blocks, 0, -1):
        if deepest_here := able[depth - 1] & ~found:
            segments.append(Segment(depth, deepest_here))
            found |= deepest_here
    return segments


def _all_of_last(held: list[int], count: int) -> list[int]:
    """Who holds each block and those before it, `count` in all or as many as there are: by doubling the span."""
    span = 1
    while span < min(count, len(held)):
        step = min(span, count - span)
        held = [mask & held[i - step] if i >= step else mask for i, mask in enumerate(held)]
        span += step
    return held

"""Which cached block makes room: the least recently released leaf, unless its tenant has no more than its floor. Pure.

Blocks of tenants with a floor (known by the root of their hash chains) queue apart from all others:

    floors {a: 2}    queue of a  [ 3  9 ]        a has 2 cached: not below its floor, so 5 goes next, then 7;
                     others      [ 5  7 ]        with 3 cached its 3 would go first

Nobody's floor is kept when there is nothing else to evict: work goes before cache.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping

from core.block_hash import BlockHash

Item = tuple[int, int]  # (logical time of the last release, block)
IsLeaf = Callable[[int, int], bool]  # whether an item is still true

_OTHERS = b""


class EvictionOrder:
    """A heap of leaves per tenant with a floor, and one for the rest; items may be stale until they are looked at."""

    def __init__(self, floors: Mapping[BlockHash, int]) -> None:
        """`floors`: cached blocks that others do not push out, by root."""
        self._floors = floors
        self._heaps: dict[BlockHash, list[Item]] = {queue: [] for queue in (_OTHERS, *floors)}
        self._num_cached: Counter[BlockHash] = Counter()

    def queue_of(self, root: BlockHash) -> BlockHash:
        """Where blocks of a chain belong."""
        return root if root in self._floors else _OTHERS

    def cached(self, queue: BlockHash) -> None:
        """One more block of this queue can be found."""
        self._num_cached[queue] += 1

    def uncached(self, queue: BlockHash) -> None:
        """One less."""
        self._num_cached[queue] -= 1

    def num_cached(self, queue: BlockHash) -> int:
        """Blocks of it that can be found."""
        return self._num_cached[queue]

    def push(self, queue: BlockHash, item: Item, most: int, is_leaf: IsLeaf) -> None:
        """A leaf was released; `most` items are more than can be true."""
        heap = self._heaps[queue]
        if len(heap) > most:
            heap[:] = [old for old in heap if is_leaf(*old)]
            heapq.heapify(heap)
        heapq.heappush(heap, item)

    def pop(self, is_leaf: IsLeaf) -> int | None:
        """The block to evict; None when no leaf is left."""
        if not self._floors:
            heap = self._heaps[_OTHERS]
            return heapq.heappop(heap)[1] if _clean(heap, is_leaf) else None
        heads = {queue: heap[0] for queue, heap in self._heaps.items() if _clean(heap, is_leaf)}
        above = {queue: head for queue, head in heads.items() if self._num_cached[queue] > self._floors.get(queue, 0)}
        if not heads:
            return None
        queue = min(above or heads, key=heads.__getitem__)
        return heapq.heappop(self._heaps[queue])[1]

    def leaves(self) -> set[Item]:
        """All items, stale ones too."""
        return {item for heap in self._heaps.values() for item in heap}


def _clean(heap: list[Item], is_leaf: IsLeaf) -> bool:
    """Drops stale items from the top; False when none is left."""
    while heap and not is_leaf(*heap[0]):
        heapq.heappop(heap)
    return bool(heap)

"""Which physical KV block holds what, and when it may be reused. Pure: no tensors, no clock.

A block has owners (sequences), writers (steps in flight, incoming transfers) and readers (outgoing transfers), and is
reusable only when all three are zero. A reusable block may still be cached: found by its key (hash and KV group) until
it is evicted, least recently released first and never before the blocks that follow it in its chain (leaf first).

    plain free  --allocate-->  owned  --register(key)-->  owned, cached
         ^                       |                              | last counter falls to zero
         +------- release -------+      reusable, cached  <-----+
         +------------------ evict -----------+     ^--acquire_cached--> owned, cached
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.block_hash import BlockKey


class OutOfBlocks(Exception):
    """More blocks were asked for than are reusable and not promised."""


@dataclass
class _Block:
    owners: int = 0
    writers: int = 0
    readers: int = 0
    key: BlockKey | None = None
    parent: BlockKey | None = None
    released_at: int = 0  # logical clock of the last release

    @property
    def reusable(self) -> bool:
        return not (self.owners or self.writers or self.readers)


class BlockPool:
    """Counts, promises and the prefix cache of one replica's KV blocks (the same ids on all its ranks)."""

    def __init__(self, num_blocks: int, *, keeps_released: bool = False) -> None:
        """`keeps_released`: somebody calls `take_released`."""
        self.num_blocks = num_blocks
        self.num_promised = 0  # reusable blocks that leases may still claim
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_reusable = num_blocks
        self._cached: dict[BlockKey, int] = {}
        self._children: dict[BlockKey, int] = {}  # cached blocks that name this key as parent
        self._evictable: list[tuple[int, int]] = []  # heap of (released_at, block), lazily cleaned
        self._clock = 0
        self._stored: list[BlockKey] = []
        self._removed: list[BlockKey] = []
        self._released: dict[int, None] | None = {} if keeps_released else None

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated or promised now; evictable cached ones count."""
        return self._num_reusable - self.num_promised

    @property
    def num_empty(self) -> int:
        """Blocks that can be allocated without evicting a cached one."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks with an owner, writer or reader."""
        return self.num_blocks - self._num_reusable

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by key."""
        return len(self._cached)

    # ---- capacity -----------------------------------------------------------------------------------------------

    def promise(self, count: int) -> None:
        """Sets reusable blocks aside for later `allocate(promised=True)`. Raises OutOfBlocks."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free of {self.num_blocks}")
        self.num_promised += count

    def unpromise(self, count: int) -> None:
        """Gives up promised blocks that were never allocated."""
        assert 0 <= count <= self.num_promised
        self.num_promised -= count

    def allocate(self, count: int, *, promised: bool = False) -> list[int]:
        """Takes `count` blocks of undefined content, owned once. Raises OutOfBlocks."""
        if promised:
            self.unpromise(count)
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free of {self.num_blocks}")
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._blocks[block].owners = 1
        self._num_reusable -= count
        return taken

    # ---- prefix cache -------------------------------------------------------------------------------------------

    def __contains__(self, key: BlockKey) -> bool:
        """Whether a block can be found by this key."""
        return key in self._cached

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """Physical ids of those of the keys that are cached, up to the first one that is not; changes nothing."""
        found = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def acquire_cached(self, keys: Sequence[BlockKey]) -> list[int]:
        """Matches and owns. Raises OutOfBlocks when promises need those blocks."""
        blocks = self.match(keys)
        self.own(blocks)
        return blocks

    def register(self, block: int, key: BlockKey, parent: BlockKey | None) -> None:
        """Makes a completely written, held block findable. A key that is cached already keeps its older block.

        `parent` is the key of a block without which this one is of no use.
        """
        entry = self._blocks[block]
        assert not entry.reusable, "only a held block has defined content"
        assert entry.key in (None, key), "a block's content is registered once"
        if entry.key is not None or key in self._cached:
            return
        entry.key, entry.parent = key, parent
        self._cached[key] = block
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1
        self._stored.append(key)

    def take_released(self, limit: int) -> dict[BlockKey, int]:
        """Cached blocks that lost their last owner since the last call, the first first; at most so many."""
        taken: dict[BlockKey, int] = {}
        while self._released and len(taken) < limit:
            block = next(iter(self._released))
            del self._released[block]
            key = self._blocks[block].key
            if key is not None:
                taken[key] = block
        return taken

    def snapshot(self) -> tuple[BlockKey, ...]:
        """All cached keys."""
        return tuple(self._cached)

    def drain_events(self) -> tuple[tuple[BlockKey, ...], tuple[BlockKey, ...]]:
        """(stored, removed) since the last call; a key that came and went, or went and came, nets out."""
        stored, removed = dict.fromkeys(self._stored), dict.fromkeys(self._removed)
        self._stored, self._removed = [], []
        now_cached = self._cached.keys()
        return tuple(key for key in stored if key in now_cached), tuple(key for key in removed if key not in now_cached)

    # ---- counters -----------------------------------------------------------------------------------------------

    def own(self, blocks: Sequence[int]) -> None:
        """One more owner each. Raises OutOfBlocks when that would eat into promised capacity."""
        self._require_free(blocks)
        for block in blocks:
            self._count(block, owners=1)

    def disown(self, blocks: Sequence[int]) -> None:
        """One owner less each; pass a sequence's blocks in logical order."""
        for block in reversed(blocks):
            self._count(block, owners=-1)
            entry = self._blocks[block]
            if self._released is not None and not entry.owners and entry.key is not None:
                self._released[block] = None

    def begin_write(self, blocks: Iterable[int]) -> None:
        """A step or transfer will write these held blocks."""
        for block in blocks:
            self._count(block, writers=1)

    def end_write(self, blocks: Iterable[int]) -> None:
        """The writer is done or quiesced."""
        for block in blocks:
            self._count(block, writers=-1)

    def begin_read(self, blocks: Iterable[int]) -> None:
        """A transfer will read these held blocks."""
        for block in blocks:
            self._count(block, readers=1)

    def begin_read_cached(self, blocks: Sequence[int]) -> None:
        """As `begin_read`, of cached blocks that may be held by nobody. Raises OutOfBlocks as `own` does."""
        self._require_free(blocks)
        for block in blocks:
            self._count(block, readers=1)

    def end_read(self, blocks: Iterable[int]) -> None:
        """The reader is done or quiesced."""
        for block in blocks:
            self._count(block, readers=-1)

    def validate(self) -> None:
        """Raises AssertionError when the books do not balance."""
        reusable = [i for i, entry in enumerate(self._blocks) if entry.reusable]
        assert len(reusable) == self._num_reusable
        assert 0 <= self.num_promised <= self._num_reusable
        assert len(set(self._free)) == len(self._free)
        for block in self._free:
            assert self._blocks[block].reusable and self._blocks[block].key is None
        queued = {block for stamp, block in self._evictable if self._blocks[block].released_at == stamp}
        for block in reusable:
            assert self._blocks[block].key is None or block in queued
            assert self._blocks[block].key is not None or block in self._free
        for key, block in self._cached.items():
            assert self._blocks[block].key == key
        assert len(self._cached) == sum(1 for entry in self._blocks if entry.key is not None)
        for parent, count in self._children.items():
            assert count == sum(1 for entry in self._blocks if entry.parent == parent) > 0

    # ---- inside -------------------------------------------------------------------------------------------------

    def _require_free(self, blocks: Sequence[int]) -> None:
        newly_held = sum(1 for block in blocks if self._blocks[block].reusable)
        if newly_held > self.num_free:
            raise OutOfBlocks(f"{newly_held} cached blocks wanted, {self.num_free} free of {self.num_blocks}")

    def _count(self, block: int, *, owners: int = 0, writers: int = 0, readers: int = 0) -> None:
        """The one door through which counters change."""
        entry = self._blocks[block]
        was_reusable = entry.reusable
        assert not was_reusable or owners > 0 or readers > 0, "a write does not take hold of a reusable block"
        entry.owners += owners
        entry.writers += writers
        entry.readers += readers
        assert min(entry.owners, entry.writers, entry.readers) >= 0, f"block {block}: counter below zero"
        if was_reusable and not entry.reusable:
            self._num_reusable -= 1
            assert entry.key is not None, "a plain free block is taken by allocate()"
        elif entry.reusable and not was_reusable:
            self._num_reusable += 1
            self._clock += 1
            entry.released_at = self._clock
            if entry.key is None:
                self._free.append(block)
            else:
                heapq.heappush(self._evictable, (entry.released_at, block))

    def _evict(self) -> int:
        """Uncaches the least recently released block that no cached block follows, else the least recent of all."""
        passed_over = []
        victim = None
        while self._evictable:
            stamp, block = heapq.heappop(self._evictable)
            entry = self._blocks[block]
            if entry.key is None or not entry.reusable or entry.released_at != stamp:
                continue
            if not self._children.get(entry.key):
                victim = block
                break
            passed_over.append((stamp, block))
        if victim is None:
            victim = passed_over.pop(0)[1]
        for item in passed_over:
            heapq.heappush(self._evictable, item)
        self._uncache(victim)
        return victim

    def _uncache(self, block: int) -> None:
        entry = self._blocks[block]
        assert entry.key is not None
        del self._cached[entry.key]
        if self._released is not None:
            self._released.pop(block, None)
        self._removed.append(entry.key)
        if entry.parent is not None:
            self._children[entry.parent] -= 1
            if not self._children[entry.parent]:
                del self._children[entry.parent]
        entry.key = entry.parent = None

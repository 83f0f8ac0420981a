"""Which physical KV block holds what, and when it may be reused. Pure: no tensors, no clock.

A block has owners (sequences), writers (steps in flight, incoming transfers) and readers (outgoing transfers), and is
reusable only when all three are zero. A reusable block may still be cached: found by its key (hash and KV group) until
it is evicted, least recently released first and never before the blocks that follow it in its chain (leaf first);
tenants may have a floor that others do not push them below, see eviction_order.

    plain free  --allocate-->  owned  --register(key)-->  owned, cached
         ^                       |                              | last counter falls to zero
         +------- release -------+      reusable, cached  <-----+
         +------------------ evict -----------+     ^--acquire_cached--> owned, cached
"""

from collections.abc import Iterable, Mapping, Sequence

from core.block_hash import BlockHash, BlockKey
from engine.eviction_order import EvictionOrder


class OutOfBlocks(Exception):
    """More blocks were asked for than are reusable and not promised."""


class BlockPool:
    """Counts, promises and the prefix cache of one replica's KV blocks (the same ids on all its ranks)."""

    def __init__(
        self, num_blocks: int, *, keeps_released: bool = False, floors: Mapping[BlockHash, int] | None = None
    ) -> None:
        """`keeps_released`: somebody calls `take_released`. `floors`: see EvictionOrder."""
        self.num_blocks = num_blocks
        self.num_promised = 0  # reusable blocks that leases may still claim
        self._owners, self._writers, self._readers = ([0] * num_blocks for _ in range(3))
        self._holds = [0] * num_blocks  # sums of those three: a block with none is reusable
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._parents: list[BlockKey | None] = [None] * num_blocks
        self._released_at = [0] * num_blocks  # logical clock of the last release
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_reusable = num_blocks
        self._cached: dict[BlockKey, int] = {}
        self._children: dict[BlockKey, int] = {}  # cached blocks that name this key as parent
        self._leaves = EvictionOrder(floors or {})  # of those that no cached block follows
        self._queues = [b""] * num_blocks  # where a cached block belongs in it
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
            self._owners[block] = self._holds[block] = 1
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
        self.register_all((block,), (key,), (parent,))

    def register_all(
        self,
        blocks: Iterable[int],
        keys: Iterable[BlockKey],
        parents: Iterable[BlockKey | None],
        root: BlockHash | None = None,
    ) -> None:
        """As `register` of each. `root` of their chain tells whose they are; None: whose the block before them is."""
        own_keys, cached, children = self._keys, self._cached, self._children
        queue = self._leaves.queue_of(root) if root is not None else None
        for block, key, parent in zip(blocks, keys, parents, strict=True):
            known = own_keys[block]
            assert self._holds[block], "only a held block has defined content"
            assert known is None or known == key, "a block's content is registered once"
            if known is not None or key in cached:
                continue
            own_keys[block], self._parents[block] = key, parent
            cached[key] = block
            if parent is not None:
                children[parent] = children.get(parent, 0) + 1
            self._queues[block] = own_queue = queue if queue is not None else self._queue_behind(parent)
            self._leaves.cached(own_queue)
            self._stored.append(key)

    def take_released(self, limit: int) -> dict[BlockKey, int]:
        """Cached blocks that lost their last owner since the last call, the first first; at most so many."""
        taken: dict[BlockKey, int] = {}
        while self._released and len(taken) < limit:
            block = next(iter(self._released))
            del self._released[block]
            key = self._keys[block]
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
        self._take_hold(self._owners, blocks)

    def disown(self, blocks: Sequence[int]) -> None:
        """One owner less each; pass a sequence's blocks in logical order."""
        if self._released is None:
            self._let_go(self._owners, reversed(blocks))
            return
        for block in reversed(blocks):
            self._let_go(self._owners, (block,))
            if not self._owners[block] and self._keys[block] is not None:
                self._released[block] = None

    def begin_write(self, blocks: Iterable[int]) -> None:
        """A step or transfer will write these held blocks."""
        writers, holds = self._writers, self._holds
        for block in blocks:
            assert holds[block], "a write does not take hold of a reusable block"
            writers[block] += 1
            holds[block] += 1

    def end_write(self, blocks: Iterable[int]) -> None:
        """The writer is done or quiesced."""
        self._let_go(self._writers, blocks)

    def begin_read(self, blocks: Iterable[int]) -> None:
        """A transfer will read these held blocks."""
        self._take_hold(self._readers, blocks)

    def begin_read_cached(self, blocks: Sequence[int]) -> None:
        """As `begin_read`, of cached blocks that may be held by nobody. Raises OutOfBlocks as `own` does."""
        self._require_free(blocks)
        self._take_hold(self._readers, blocks)

    def end_read(self, blocks: Iterable[int]) -> None:
        """The reader is done or quiesced."""
        self._let_go(self._readers, blocks)

    def validate(self) -> None:
        """Raises AssertionError when the books do not balance."""
        counters = zip(self._owners, self._writers, self._readers, strict=True)
        assert [sum(counts) for counts in counters] == self._holds
        reusable = [block for block, holds in enumerate(self._holds) if not holds]
        assert len(reusable) == self._num_reusable
        assert 0 <= self.num_promised <= self._num_reusable
        assert len(set(self._free)) == len(self._free)
        for block in self._free:
            assert not self._holds[block] and self._keys[block] is None
        leaves = {block for stamp, block in self._leaves.leaves() if self._released_at[block] == stamp}
        for queue in set(self._queues):
            assert self._leaves.num_cached(queue) == sum(
                self._queues[block] == queue for block in self._cached.values()
            )
        for block in reusable:
            key = self._keys[block]
            assert (block in self._free) if key is None else (key in self._children or block in leaves)
        for key, block in self._cached.items():
            assert self._keys[block] == key
        assert len(self._cached) == sum(1 for key in self._keys if key is not None)
        for parent, count in self._children.items():
            assert count == sum(1 for other in self._parents if other == parent) > 0

    # ---- inside -------------------------------------------------------------------------------------------------

    def _require_free(self, blocks: Sequence[int]) -> None:
        newly_held = sum(1 for block in blocks if not self._holds[block])
        if newly_held > self.num_free:
            raise OutOfBlocks(f"{newly_held} cached blocks wanted, {self.num_free} free of {self.num_blocks}")

    def _take_hold(self, counters: list[int], blocks: Iterable[int]) -> None:
        """One more each; reusable blocks are held from now on."""
        holds = self._holds
        for block in blocks:
            if not holds[block]:
                self._num_reusable -= 1
                assert self._keys[block] is not None, "a plain free block is taken by allocate()"
            counters[block] += 1
            holds[block] += 1

    def _let_go(self, counters: list[int], blocks: Iterable[int]) -> None:
        """One less each; those that nobody holds any more become reusable, in this order."""
        holds = self._holds
        for block in blocks:
            assert counters[block] > 0, f"block {block}: counter below zero"
            counters[block] -= 1
            holds[block] -= 1
            if not holds[block]:
                self._become_reusable(block)

    def _become_reusable(self, block: int) -> None:
        self._num_reusable += 1
        self._clock += 1
        self._released_at[block] = self._clock
        key = self._keys[block]
        if key is None:
            self._free.append(block)
        elif key not in self._children:
            self._queue_leaf(block)

    def _queue_behind(self, parent: BlockKey | None) -> BlockHash:
        before = self._cached.get(parent) if parent is not None else None
        return self._queues[before] if before is not None else b""

    def _queue_leaf(self, block: int) -> None:
        item = self._released_at[block], block
        self._leaves.push(self._queues[block], item, 2 * self.num_blocks, self._is_leaf)

    def _is_leaf(self, stamp: int, block: int) -> bool:
        """Whether an item of the heap is still true."""
        key = self._keys[block]
        is_evictable = key is not None and not self._holds[block] and self._released_at[block] == stamp
        return is_evictable and key not in self._children

    def _evict(self) -> int:
        """Uncaches the next block in the eviction order, else the least recently released of all."""
        block = self._leaves.pop(self._is_leaf)
        if block is None:
            evictable = (block for block in self._cached.values() if not self._holds[block])
            block = min(evictable, key=self._released_at.__getitem__)
        self._uncache(block)
        return block

    def _uncache(self, block: int) -> None:
        key, parent = self._keys[block], self._parents[block]
        assert key is not None
        del self._cached[key]
        self._leaves.uncached(self._queues[block])
        if self._released is not None:
            self._released.pop(block, None)
        self._removed.append(key)
        if parent is not None:
            num_left = self._children.pop(parent) - 1
            if num_left:
                self._children[parent] = num_left
            else:
                followed = self._cached.get(parent)
                if followed is not None and not self._holds[followed]:
                    self._queue_leaf(followed)
        self._keys[block] = self._parents[block] = None

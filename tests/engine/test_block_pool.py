"""The block pool's books: reuse only at zero counters, LRU leaf first, promises never oversold."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.block_hash import chain_seed, hash_block, hash_blocks
from engine.block_pool import BlockPool, OutOfBlocks


def cache_chain(pool: BlockPool, tokens: list[int], block_size: int = 2) -> list[int]:
    hashes = hash_blocks(tokens, block_size)
    blocks = pool.allocate(len(hashes))
    parent = None
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.register(block, block_hash, parent)
        parent = block_hash
    return blocks


def test_a_released_chain_is_found_again_and_evicted_from_its_end():
    pool = BlockPool(4)
    blocks = cache_chain(pool, [1, 2, 3, 4, 5, 6])
    pool.disown(blocks)
    pool.validate()
    hashes = hash_blocks([1, 2, 3, 4, 5, 6], 2)
    assert pool.match(hashes) == blocks
    pool.allocate(2)  # one plain block, then one eviction
    assert pool.match(hashes) == blocks[:2]
    pool.validate()


def test_a_parent_outlives_its_children_even_when_released_earlier():
    pool = BlockPool(2)
    parent_hash = hash_block(chain_seed(), [1])
    child_hash = hash_block(parent_hash, [2])
    parent, child = pool.allocate(2)
    pool.register(parent, parent_hash, None)
    pool.register(child, child_hash, parent_hash)
    pool.disown([parent])
    pool.disown([child])
    pool.allocate(1)
    assert pool.match([parent_hash, child_hash]) == [parent]


@pytest.mark.parametrize("kind", ["write", "read"])
def test_a_block_with_a_transfer_in_flight_is_not_reused(kind):
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    getattr(pool, f"begin_{kind}")(blocks)
    pool.disown(blocks)
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    getattr(pool, f"end_{kind}")(blocks)
    assert pool.allocate(1) == blocks


def test_promised_blocks_are_neither_allocated_nor_pinned_by_others():
    pool = BlockPool(3)
    blocks = cache_chain(pool, [1, 2, 3, 4])
    pool.disown(blocks)
    pool.promise(2)
    with pytest.raises(OutOfBlocks):
        pool.acquire_cached(hash_blocks([1, 2, 3, 4], 2))
    assert pool.num_held == 0
    assert len(pool.allocate(2, promised=True)) == 2
    pool.validate()


class PoolMachine(RuleBasedStateMachine):
    """Random lives of sequences; the pool's own validate() is the oracle of its books, `held` of its promises."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.promised = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def run_sequence(self, tokens):
        hashes = hash_blocks(tokens, 1)
        cached = self.pool.match(hashes)
        try:
            blocks = self.pool.acquire_cached(hashes)
        except OutOfBlocks:
            return
        assert blocks == cached
        try:
            blocks += self.pool.allocate(len(hashes) - len(blocks))
        except OutOfBlocks:
            self.pool.disown(blocks)
            return
        flat = [b for held in self.held for b in held]
        assert not set(blocks[len(cached) :]) & set(flat), "a held block was handed out again"
        for i in range(len(cached), len(blocks)):
            self.pool.register(blocks[i], hashes[i], hashes[i - 1] if i else None)
        self.held.append(blocks)

    @rule(data=st.data())
    def end_sequence(self, data):
        if self.held:
            self.pool.disown(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(count=st.integers(1, 3))
    def promise(self, count):
        try:
            self.pool.promise(count)
            self.promised += count
        except OutOfBlocks:
            assert count > self.pool.num_free

    @rule()
    def claim(self):
        if self.promised:
            self.held.append(self.pool.allocate(self.promised, promised=True))
            self.promised = 0

    @invariant()
    def books_balance(self):
        self.pool.validate()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def cache_of_tenant(pool: BlockPool, root: bytes, length: int, prompt: bytes = b"") -> list[bytes]:
    """A chain of blocks of a tenant, computed and released."""
    keys = [root + prompt + bytes([number]) for number in range(length)]
    blocks = pool.allocate(length)
    pool.register_all(blocks, keys, [None, *keys[:-1]], root)
    pool.disown(blocks)
    return keys


def test_a_tenants_flood_leaves_another_its_floor():
    pool = BlockPool(10, floors={b"a": 4})
    own = cache_of_tenant(pool, b"a", 6)
    for number in range(20):
        cache_of_tenant(pool, b"flood" + bytes([number]), 3)
        pool.validate()
    assert [key in pool for key in own] == [True] * 4 + [False] * 2
    newer = cache_of_tenant(pool, b"a", 9, prompt=b"other")  # its own newer blocks do push out its older ones
    pool.validate()
    assert [key in pool for key in own].count(True) == 1 and all(key in pool for key in newer)


def test_work_goes_before_a_floor():
    pool = BlockPool(4, floors={b"a": 3})
    cache_of_tenant(pool, b"a", 3)
    assert len(pool.allocate(4)) == 4
    pool.validate()


def test_what_arrives_behind_a_tenants_block_is_that_tenants():
    pool = BlockPool(6, floors={b"a": 3})
    (first,) = cache_of_tenant(pool, b"a", 1)
    blocks = pool.allocate(2)
    pool.register_all(blocks, [b"x", b"y"], [first, b"x"])  # pulled from elsewhere: nobody says whose it is
    pool.disown(blocks)
    for number in range(5):
        cache_of_tenant(pool, b"flood" + bytes([number]), 3)
    assert first in pool and b"x" in pool and b"y" in pool
    pool.validate()

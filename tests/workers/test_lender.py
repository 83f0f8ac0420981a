"""What a replica lends of its cache: of each KV group what it takes to go on behind the prefix, and nothing else."""

from core.block_hash import chain_seed, hash_blocks
from core.kv_groups import KVGroup
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_decode import Sequence
from core.messages.to_lender import Borrow
from core.messages.to_rank import SlabHeader, Span
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.sequence import ActiveSequence
from worker.lender import Lender

LAYOUT = KVLayout(3, 1, 1, 2, "float32", 1, groups=(KVGroup((1,)), KVGroup((0, 2), 4)))
TOKENS = tuple(range(20))
HASHES = hash_blocks(TOKENS, 2)


def lender_of(pool: BlockPool) -> Lender:
    same = Compatibility("m", "r", "float32", 2, "h")
    return Lender(ReplicaInfo("p", Role.PREFILL, 1, ("p",), LAYOUT, same, pool.num_blocks, 3, 4, 64), pool, 9.0)


def cached_pool() -> BlockPool:
    pool = BlockPool(40)
    sequence = ActiveSequence(pool, LAYOUT, Sequence(TOKENS, HASHES, SamplingParams(1), chain_seed()))
    sequence.acquire_prefix()
    sequence.reserve(20)
    sequence.grow(20)
    sequence.advance(20)
    sequence.release()
    return pool


def test_a_prefix_is_lent_with_its_last_window():
    pool = cached_pool()
    lender = lender_of(pool)
    lent = lender.lend(Borrow("loan", HASHES[2:], 2), 0.0)
    assert [(group.group, group.first_block, len(group.source_blocks)) for group in lent.groups] == [
        (0, 2, 8),
        (1, 8, 2),
    ]
    assert lent.source_blocks == lent.groups[0].source_blocks and pool.num_held == 10
    assert lender.lend(Borrow("loan", HASHES[2:], 2), 0.0) == lent
    lender.give_back("loan", 1.0)
    assert pool.num_held == 0
    lender.validate()


def test_blocks_of_one_group_are_lent_up_to_the_first_that_is_missing():
    pool = cached_pool()
    lent = lender_of(pool).lend(Borrow("loan", (*HASHES[4:7], b"unknown", *HASHES[8:]), 4, 1), 0.0)
    assert [(group.group, group.first_block, len(group.source_blocks)) for group in lent.groups] == [(1, 4, 3)]
    assert lender_of(BlockPool(4)).lend(Borrow("loan", HASHES, 0, 1), 0.0).groups == ()


def test_a_slab_is_read_under_its_kv_group_alone():
    lender = lender_of(cached_pool())
    full, windowed = lender.lend(Borrow("loan", HASHES, 0), 0.0).groups

    def may_read(group: int, block: int, logical: int, num_layers: int) -> bool:
        span = Span(0, num_layers, (block,), 0, 1)
        return lender.may_read(SlabHeader(0, "loan", 0, span, 0, (logical,), group))

    assert may_read(0, full.source_blocks[9], 9, 1) and may_read(1, windowed.source_blocks[1], 9, 2)
    assert not may_read(1, full.source_blocks[9], 9, 1) and not may_read(0, windowed.source_blocks[1], 9, 1)
    assert not may_read(0, full.source_blocks[9], 9, 2), "the group has one layer"
    assert not may_read(1, windowed.source_blocks[1], 7, 2)

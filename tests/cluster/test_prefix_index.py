"""A routed hit is the engine's hit: the index says of each replica what its block pool would find."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.rules import can_pair
from core.block_hash import chain_seed, hash_blocks, in_group
from core.kv_groups import KVGroup
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_decode import Sequence
from core.sampling import SamplingParams
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence

PLAIN = KVLayout(3, 1, 1, 2, "float32", 1)
MIXED = replace(PLAIN, groups=(KVGroup((1,)), KVGroup((0,), 4), KVGroup((2,), 6)))
LOCAL = replace(PLAIN, groups=(KVGroup((0, 1, 2), 5),))
LAYOUTS = {"a": PLAIN, "b": MIXED, "c": MIXED, "d": LOCAL}
PROMPTS = [tuple(range(9)), tuple(range(24)), (*range(13), *range(113, 124)), tuple(range(200, 218))]


def sequence_of(pool: BlockPool, layout: KVLayout, tokens: tuple[int, ...]) -> ActiveSequence:
    hashes = hash_blocks(tokens, layout.block_size)
    return ActiveSequence(pool, layout, Sequence(tokens, hashes, SamplingParams(1), chain_seed()))


def hit(pool: BlockPool, layout: KVLayout, tokens: tuple[int, ...]) -> int:
    """Blocks of the prompt that an engine need not compute."""
    sequence = sequence_of(pool, layout, tokens)
    sequence.acquire_prefix()
    sequence.release()
    return sequence.num_cached // layout.block_size


class Fleet(RuleBasedStateMachine):
    """Replicas of three layouts in small pools compute prompts and evict; after each, the index hears of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = {name: BlockPool(44) for name in LAYOUTS}
        self.index = PrefixIndex()

    @rule(name=st.sampled_from(sorted(LAYOUTS)), prompt=st.sampled_from(PROMPTS), share=st.integers(1, 12))
    def compute(self, name, prompt, share):
        pool, layout = self.pools[name], LAYOUTS[name]
        sequence = sequence_of(pool, layout, prompt)
        try:
            sequence.acquire_prefix()
            sequence.reserve(4)
            for _ in range(share):
                num_tokens = min(4, sequence.num_uncomputed)
                sequence.grow(sequence.num_computed + num_tokens)
                sequence.advance(num_tokens)
        except OutOfBlocks:
            pass
        sequence.release()
        self.hear(name)

    @rule(name=st.sampled_from(sorted(LAYOUTS)), count=st.integers(1, 44))
    def evict(self, name, count):
        pool = self.pools[name]
        pool.disown(pool.allocate(count))
        self.hear(name)

    def hear(self, name):
        stored, removed = self.pools[name].drain_events()
        self.index.remove(name, removed)
        self.index.store(name, stored, LAYOUTS[name].reaches)

    @invariant()
    def a_routed_hit_is_the_engines(self):
        for prompt in PROMPTS:
            usable = hash_blocks(prompt, 2)[: (len(prompt) - 1) // 2]
            expected = {name: hit(pool, LAYOUTS[name], prompt) for name, pool in self.pools.items()}
            assert self.index.match(usable) == {name: depth for name, depth in expected.items() if depth}


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_blocks_of_one_kv_group_are_not_found_in_another():
    hashes = hash_blocks(range(8), 2)
    index = PrefixIndex()
    index.store("b", [*hashes, *(in_group(block_hash, 1) for block_hash in hashes)], MIXED.reaches)
    assert index.match(hashes) == {}
    index.store("b", [in_group(block_hash, 2) for block_hash in hashes[1:4]], MIXED.reaches)
    assert index.match(hashes) == {"b": 4}, "the last three blocks of the longer window, two of the shorter"
    index.remove("b", [in_group(hashes[1], 2)])
    assert index.match(hashes) == {}
    index.remove_replica("b")
    assert len(index) == 0


def test_replicas_that_group_their_layers_otherwise_do_not_pair():
    """One of a release that knew no groups says nothing of them."""
    same = Compatibility("m", "r", "float32", 2, "h")
    ours, theirs = (
        ReplicaInfo(name, Role.DECODE, 1, (name,), layout, same, 9, 1, 64, 64)
        for name, layout in (("ours", LOCAL), ("theirs", PLAIN))
    )
    assert can_pair(ours, ours) and can_pair(theirs, theirs)
    assert not can_pair(ours, theirs) and not can_pair(theirs, ours)

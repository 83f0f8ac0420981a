"""The index against a model that remembers, per replica, KV group and tier, what each report said."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.scheduler.admission import Admission
from cluster.scheduler.index import PrefixIndex
from core.block_hash import hash_blocks, in_group
from core.config import SchedulerConfig
from core.kv_groups import deepest_prefix, needed_run
from core.messages.fleet import Role
from core.messages.to_scheduler import Report
from tests.cluster.scheduler_world import info, status

REACHES = {"a": (None,), "b": (None,), "c": (None, 2), "d": (None, 2), "e": (3,), "f": (2, None)}
CHAINS = [hash_blocks((*range(2 * start), *range(100 + start, 140)), 2)[:12] for start in (0, 3, 8)]
KEYS = sorted({in_group(one, group) for chain in CHAINS for one in chain for group in (0, 1)})


class IndexModel(RuleBasedStateMachine):
    """Any blocks in any order: holes, unknown removals, blocks that move between tiers, replicas that come back."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[str, dict[bytes, int]] = {name: {} for name in REACHES}

    @rule(name=st.sampled_from(sorted(REACHES)), keys=st.lists(st.sampled_from(KEYS)), seed=st.integers(0, 9))
    def store(self, name, keys, seed):
        rng = random.Random(seed)
        tiers = bytes(rng.choice((0, 0, 1, 2)) for _ in keys)
        self.index.store(name, keys, REACHES[name], tiers if seed % 3 else b"")
        by_key = dict(zip(keys, tiers if seed % 3 else bytes(len(keys)), strict=True))
        if len(by_key) < len(keys):  # a report names a block once; of a test that does not, the last tier counts
            for tier in sorted({*tiers}):
                again = [key for key, found in zip(keys, tiers, strict=True) if found == tier and seed % 3]
                by_key |= dict.fromkeys(again, tier)
        self.held[name] |= by_key

    @rule(name=st.sampled_from(sorted(REACHES)), chain=st.sampled_from(CHAINS), depth=st.integers(1, 12))
    def compute(self, name, chain, depth):
        for group in range(len(REACHES[name])):
            keys = [in_group(one, group) for one in chain[:depth]]
            self.index.store(name, keys, REACHES[name])
            self.held[name] |= dict.fromkeys(keys, 0)

    @rule(name=st.sampled_from(sorted(REACHES)), keys=st.lists(st.sampled_from(KEYS)))
    def remove(self, name, keys):
        self.index.remove(name, keys)
        for key in keys:
            self.held[name].pop(key, None)

    @rule(name=st.sampled_from(sorted(REACHES)))
    def lose(self, name):
        self.index.remove_replica(name)
        self.held[name] = {}

    @invariant()
    def matches_are_those_of_every_replica_by_itself(self):
        for chain in CHAINS:
            matches = self.index.match(chain)
            expected = {
                name: deepest_prefix(reaches, chain, self.held[name].__contains__) for name, reaches in REACHES.items()
            }
            assert dict(matches) == {name: depth for name, depth in expected.items() if depth}
            assert {name: matches.depth(name) for name in REACHES} == expected
            for name, depth in expected.items():
                assert matches.num_below(name, depth, REACHES[name]) == self.below(name, chain, depth)

    def below(self, name, chain, depth):
        """Blocks that the match rule asks for and that the device lacks."""
        found: dict[int, int] = {}
        for group, reach in enumerate(REACHES[name]):
            for block in range(depth - needed_run(reach, depth), depth):
                if tier := self.held[name][in_group(chain[block], group)]:
                    found[tier] = found.get(tier, 0) + 1
        return found

    @invariant()
    def nothing_is_kept_of_what_nobody_holds(self):
        assert len(self.index) == len({key for held in self.held.values() for key in held})
        for name, held in self.held.items():
            assert self.index.held_by(name) == held.keys()


TestIndexModel = IndexModel.TestCase
TestIndexModel.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


def test_a_snapshot_after_a_gap_replaces_what_was_known():
    admission = Admission(SchedulerConfig(replica_timeout_s=1e9))
    chain = hash_blocks(range(160), 16)
    d0 = info("d0", Role.DECODE)
    admission.report(Report(d0, 0, True, status(), chain, ()), 0.0)
    assert admission.index.match(chain) == {"d0": 10}
    admission.report(Report(d0, 0, True, status(), chain[:4], (), bytes([0, 0, 1, 1])), 1.0)
    matches = admission.index.match(chain)
    assert matches == {"d0": 4} and matches.num_below("d0", 4, (None,)) == {1: 2}
    assert len(admission.index) == 4


def test_blocks_that_are_shared_share_their_set_of_holders():
    """A thousand blocks in three replicas, cut off at two depths: three sets."""
    index = PrefixIndex()
    chain = hash_blocks(range(16_000), 16)
    for name, depth in (("a", 1000), ("b", 600), ("c", 300)):
        index.store(name, chain[:depth])
    assert (len(index), index.num_sets) == (1000, 3)
    assert index.match(chain) == {"a": 1000, "b": 600, "c": 300}
    index.remove_replica("b")
    assert index.num_sets == 2
    index.remove_replica("a")
    index.remove_replica("c")
    assert (len(index), index.num_sets) == (0, 0)


def test_a_replica_that_stores_and_evicts_for_long_keeps_no_more_than_it_holds():
    index = PrefixIndex()
    for number in range(300):
        keys = [b"%d-%d" % (number, i) for i in range(64)]
        index.store("a", keys)
        index.remove("a", keys)
    assert len(index) == 0
    assert len(index._replicas["a"].keys) <= 1024 + 64
    assert index.match([b"299-0"]) == {}

"""The books of the tiers below the device: least recently used blocks go down, what is in use stays."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.block_hash import hash_blocks
from core.messages.to_rank import TierMove
from engine.kv_tiers import DEVICE, KVTiers

HOST, DISK = 1, 2
CHAIN = hash_blocks(range(8), 1)


def spill(tiers: KVTiers, hashes, now: float = 0.0):
    """Device block n holds CHAIN[n]."""
    made = tiers.spill({name: CHAIN.index(name) for name in hashes}, now)
    if made is not None:
        tiers.spilled(made)
    tiers.validate()
    return made


def test_a_released_block_is_copied_once():
    tiers = KVTiers([4])
    first = spill(tiers, CHAIN[:2])
    assert first.moves == (TierMove(DEVICE, HOST, (0, 1), (0, 1)),)
    assert first.blocks == (0, 1)
    assert spill(tiers, CHAIN[:2]) is None


def test_a_full_tier_passes_its_least_recently_used_blocks_on_before_they_are_overwritten():
    tiers = KVTiers([2, 2])
    spill(tiers, CHAIN[:2])
    spill(tiers, CHAIN[:1])  # used again: the other one goes
    made = spill(tiers, CHAIN[2:3])
    assert made.moves == (TierMove(HOST, DISK, (1,), (0,)), TierMove(DEVICE, HOST, (2,), (1,)))
    assert tiers.tiers_of([CHAIN[1]]) == [DISK]
    assert tiers.tiers_of(CHAIN[:3]) == [HOST, DISK, HOST]


def test_the_last_tier_forgets_and_says_so():
    tiers = KVTiers([1])
    spill(tiers, CHAIN[:1])
    assert tiers.drain_changed() == {CHAIN[0]}
    spill(tiers, CHAIN[1:2])
    assert tiers.drain_changed() == {CHAIN[0], CHAIN[1]}
    assert tiers.snapshot() == (CHAIN[1],)


def test_what_is_read_or_still_coming_is_not_overwritten():
    tiers = KVTiers([1])
    assert tiers.spill({CHAIN[0]: 0}, 0.0) is not None
    assert not tiers.holds(CHAIN[0])
    with pytest.raises(AssertionError, match="one spill at a time"):
        tiers.spill({CHAIN[1]: 1}, 0.0)
    tiers.spilled(tiers._spilling)
    found = tiers.begin_restore(CHAIN, 0.0)
    assert found.keys == CHAIN[:1]
    assert found.moves_to([7]) == (TierMove(HOST, DEVICE, (0,), (7,)),)
    assert spill(tiers, CHAIN[1:2]) is None
    tiers.end_restore(found)
    assert spill(tiers, CHAIN[1:2]) is not None


def test_a_failed_spill_leaves_nothing_to_be_found():
    tiers = KVTiers([1, 1])
    spill(tiers, CHAIN[:1])
    failed = tiers.spill({CHAIN[1]: 1}, 0.0)
    tiers.spill_failed(failed)
    tiers.validate()
    assert tiers.snapshot() == ()


def test_a_restore_takes_each_block_from_where_it_lies():
    tiers = KVTiers([1, 3])
    for number in (2, 1, 0):
        spill(tiers, CHAIN[number : number + 1])
    found = tiers.begin_restore(CHAIN, 1.0)
    assert found.moves_to([10, 11, 12]) == (
        TierMove(HOST, DEVICE, (0,), (10,)),
        TierMove(DISK, DEVICE, (1, 0), (11, 12)),
    )


def test_blocks_that_nobody_uses_for_long_leave_the_last_tier():
    tiers = KVTiers([1, 2], ttl_s=10.0)
    for now, number in ((0.0, 0), (5.0, 1), (6.0, 2)):
        spill(tiers, CHAIN[number : number + 1], now)
    assert tiers.expire(15.0) == 0  # the first came down when the second came
    assert tiers.expire(15.5) == 1
    assert set(tiers.snapshot()) == {CHAIN[1], CHAIN[2]}
    assert tiers.expire(16.5) == 1
    assert tiers.snapshot() == (CHAIN[2],)  # host memory has no age limit


class TiersMachine(RuleBasedStateMachine):
    """Executes every move on pretended memory, and compares what is found with what was put there."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers = KVTiers([2, 3], ttl_s=20.0)
        self.memory = {DEVICE: dict(enumerate(CHAIN)), HOST: {}, DISK: {}}
        self.spilling = None
        self.reading = []
        self.now = 0.0

    @precondition(lambda self: self.spilling is None)
    @rule(numbers=st.sets(st.integers(0, len(CHAIN) - 1), min_size=1, max_size=4))
    def begin_spill(self, numbers):
        self.spilling = self.tiers.spill({CHAIN[n]: n for n in numbers}, self.now)

    @precondition(lambda self: self.spilling is not None)
    @rule(succeeds=st.booleans())
    def end_spill(self, succeeds):
        for move in self.spilling.moves if succeeds else self.spilling.moves[:1]:
            for source, destination in zip(move.source_slots, move.destination_slots, strict=True):
                self.memory[move.destination][destination] = self.memory[move.source][source]
        (self.tiers.spilled if succeeds else self.tiers.spill_failed)(self.spilling)
        self.spilling = None

    @rule(first=st.integers(0, len(CHAIN) - 1))
    def begin_restore(self, first):
        self.reading.append(self.tiers.begin_restore(CHAIN[first:], self.now))

    @precondition(lambda self: self.reading)
    @rule()
    def end_restore(self):
        self.tiers.end_restore(self.reading.pop(0))

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds):
        self.now += seconds
        self.tiers.expire(self.now)

    @invariant()
    def books_and_memory_agree(self):
        self.tiers.validate()
        for found in self.reading:
            for name, tier, slot in zip(found.keys, found.tiers, found.slots, strict=True):
                assert self.memory[tier][slot] == name
        for tier in self.tiers.tiers:
            for name, entry in tier.held.items():
                assert not entry.is_written or self.memory[tier.number][entry.slot] == name


TiersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_every_order_of_spills_and_restores = TiersMachine.TestCase

"""What a sequence holds of the pool while it is computed: windows alone where layers see windows."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.block_hash import chain_seed, hash_blocks
from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from core.messages.to_decode import Sequence
from core.sampling import SamplingParams
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence

MIXED = KVLayout(3, 1, 1, 2, "float32", 1, groups=(KVGroup((1,)), KVGroup((0,), 4), KVGroup((2,), 4)))
AT_ONCE = 6
MOST = 6  # blocks of 2 that 3 tokens behind a step's first and its 6 tokens lie in


def sequence_of(pool: BlockPool, tokens: range | tuple[int, ...], layout: KVLayout = MIXED) -> ActiveSequence:
    prompt = Sequence(tuple(tokens), hash_blocks(tokens, layout.block_size), SamplingParams(99), chain_seed())
    return ActiveSequence(pool, layout, prompt)


def start(pool: BlockPool, tokens: range | tuple[int, ...]) -> ActiveSequence:
    """Raises OutOfBlocks, holding nothing."""
    sequence = sequence_of(pool, tokens)
    try:
        sequence.acquire_prefix()
        sequence.reserve(AT_ONCE)
    except OutOfBlocks:
        sequence.release()
        raise
    return sequence


def compute(sequence: ActiveSequence, num_tokens: int) -> None:
    """One step. Raises OutOfBlocks before it begins."""
    sequence.grow(sequence.num_launched + num_tokens)
    sequence.launch(num_tokens, number=0)
    sequence.advance(num_tokens)


def held(sequence: ActiveSequence) -> list[tuple[int, int]]:
    """By group: the first logical block that is held, and the one after the last."""
    return [(blocks.first, blocks.end) for blocks in sequence.groups]


def test_blocks_behind_a_window_are_given_back_step_by_step():
    pool = BlockPool(120)
    sequence = start(pool, range(60))
    assert (pool.num_held, pool.num_promised) == (30, 2 * MOST), "the group without a window has all of its blocks"
    for num_computed in range(6, 61, 6):
        compute(sequence, 6)
        first = max(0, num_computed - 3) // 2
        assert held(sequence) == [(0, 30)] + [(first, num_computed // 2)] * 2
        assert pool.num_held + pool.num_promised <= 30 + 2 * MOST
        pool.validate()
    assert (pool.num_held, pool.num_promised) == (30 + 2 * 2, 0), "the prompt is computed: nothing is promised any more"
    for _ in range(10):
        sequence.append(7)
        compute(sequence, 1)
    assert held(sequence) == [(0, 35), (33, 35), (33, 35)]
    sequence.release()
    pool.validate()
    assert pool.num_held == pool.num_promised == 0 and pool.num_cached == 3 * 35


PLAIN = KVLayout(1, 1, 1, 2, "float32", 1)


@pytest.mark.parametrize("is_over", [False, True])
def test_what_others_computed_meanwhile_takes_the_place_of_blocks_that_wait(is_over):
    """Of 20 tokens in blocks of 2 the first 14 are as those of a prompt that was under way."""
    pool = BlockPool(24)
    first = sequence_of(pool, range(20), PLAIN)
    second = sequence_of(pool, (*range(14), *range(90, 96)), PLAIN)
    for one in (first, second):
        one.acquire_prefix()
        one.reserve(AT_ONCE)
    assert (pool.num_held, second.num_cached) == (20, 0)
    for _ in range(3):
        compute(first, 6)
    if is_over:
        first.release()
    second.acquire_computed_since()
    assert (second.num_cached, second.num_known_to_launch, second.num_acquired) == (14, 6, 7)
    assert pool.num_held == (10 if is_over else 13)
    pool.validate()
    table = second.groups[0].blocks[:7]
    assert table == pool.match(second._hashes[:7]), "what was computed once is read by both"
    compute(second, 4)
    second.acquire_computed_since()
    assert (second.num_cached, second.num_computed) == (14, 18), "once it has begun it goes on"
    compute(second, 2)
    second.release()
    first.release()
    pool.validate()
    assert pool.num_held == 0


def test_one_token_is_left_to_compute_of_a_prompt_that_another_had_whole():
    pool = BlockPool(24)
    first, second = (sequence_of(pool, range(20), PLAIN) for _ in range(2))
    for one in (first, second):
        one.acquire_prefix()
        one.reserve(20)
    compute(first, 20)
    second.acquire_computed_since()
    assert (second.num_cached, second.num_known_to_launch) == (18, 2)
    pool.validate()


def test_a_prompt_needs_a_pool_for_its_full_layers_and_windows_only():
    needed = MIXED.num_blocks_held(60, AT_ONCE)
    assert needed == 30 + 2 * MOST
    with pytest.raises(OutOfBlocks):
        start(BlockPool(needed - 1), range(60))
    pool = BlockPool(needed)
    sequence = start(pool, range(60))
    while sequence.num_uncomputed:
        compute(sequence, min(AT_ONCE, sequence.num_uncomputed))
    sequence.release()
    assert pool.num_held == pool.num_promised == 0


def test_a_started_prompt_has_room_whatever_others_take():
    pool = BlockPool(80)
    sequence = start(pool, range(60))
    while sequence.num_uncomputed:
        taken = pool.allocate(pool.num_free)
        compute(sequence, min(AT_ONCE, sequence.num_uncomputed))
        pool.disown(taken)
    sequence.release()
    assert pool.num_held == pool.num_promised == 0


def test_a_step_reads_from_the_first_block_that_it_sees():
    pool = BlockPool(100)
    sequence = start(pool, range(60))
    compute(sequence, 6)
    compute(sequence, 6)
    sequence.grow(18)
    assert len(sequence.blocks_written_by(6)) == 3 * 3
    step = sequence.launch(6, number=0)
    assert [(table.first, len(table.blocks)) for table in step.block_tables] == [(0, 9), (4, 5), (4, 5)]
    sequence.release()


def test_the_next_turn_begins_behind_what_is_cached_of_its_window():
    pool = BlockPool(100)
    first = start(pool, range(60))
    while first.num_uncomputed:
        compute(first, min(AT_ONCE, first.num_uncomputed))
    first.release()
    second = start(pool, range(80))
    assert second.num_cached == 60 and held(second) == [(0, 40), (28, 30), (28, 30)]
    assert second.num_acquired == 30 + 2 * 2
    second.release()


def test_without_the_last_window_a_prefix_is_used_as_far_as_one_is_cached():
    pool = BlockPool(100)
    short, long = start(pool, range(30)), start(pool, range(60))
    for sequence in (short, long):
        while sequence.num_uncomputed:
            compute(sequence, min(AT_ONCE, sequence.num_uncomputed))
    long.release()
    turn = sequence_of(pool, range(80))
    turn.acquire_prefix()
    assert turn.num_cached == 60
    turn.release()
    taken = pool.allocate(pool.num_free - 10)  # short's blocks are held, long's go but for the last ones released
    turn.acquire_prefix()
    assert turn.num_cached == 30 and held(turn) == [(0, 15), (13, 15), (13, 15)]
    for sequence in (turn, short):
        sequence.release()
    pool.disown(taken)
    pool.validate()


def test_blocks_to_come_are_those_that_the_token_after_the_prompt_sees():
    pool = BlockPool(100)
    first = start(pool, range(60))
    while first.num_uncomputed:
        compute(first, min(AT_ONCE, first.num_uncomputed))
    first.release()
    longer, same = sequence_of(pool, range(80)), sequence_of(pool, range(60))
    longer.acquire_received()
    same.acquire_received()
    assert held(longer) == [(0, 30), (38, 38), (38, 38)], "what the window of the longer one sees is not cached"
    assert held(same) == [(0, 30), (28, 30), (28, 30)]
    longer.release()
    same.release()
    assert pool.num_held == 0


class SequenceMachine(RuleBasedStateMachine):
    """Sequences that share prefixes of each other in a small pool: some always gets on, and the books balance."""

    num_blocks = 60

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.num_blocks)
        self.running: list[ActiveSequence] = []
        self.lent: list[list[int]] = []

    @rule(branch=st.integers(1, 15), length=st.integers(1, 30))
    def begin(self, branch, length):
        tokens = tuple(position if position < 2 * branch else position + 100 * branch for position in range(length))
        try:
            self.running.append(start(self.pool, tokens))
        except OutOfBlocks:
            assert self.pool.num_held == len(set(self.all_held()))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, AT_ONCE))
    def step(self, data, num_tokens):
        sequence = self.running[data.draw(st.integers(0, len(self.running) - 1))]
        num_tokens = min(num_tokens, sequence.num_uncomputed)
        if num_tokens:
            try:
                compute(sequence, num_tokens)
            except OutOfBlocks:
                assert len(self.running) > 1 or self.lent, "alone, a sequence has what it needs"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        self.running.pop(data.draw(st.integers(0, len(self.running) - 1))).release()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lend(self, data):
        blocks = [b for group in self.running[-1].groups for b in group.blocks]
        if blocks:
            lent = [blocks[data.draw(st.integers(0, len(blocks) - 1))]]
            self.pool.begin_read(lent)
            self.lent.append(lent)

    @precondition(lambda self: self.lent)
    @rule()
    def take_back(self):
        self.pool.end_read(self.lent.pop())

    @invariant()
    def books_balance(self):
        self.pool.validate()
        assert self.pool.num_promised == sum(sequence.num_promised for sequence in self.running)
        for sequence in self.running:
            for blocks in sequence.groups:
                assert blocks.first == blocks.first_needed(sequence.num_computed)
                if blocks.group.window is not None:
                    assert len(blocks.blocks) <= MOST

    def teardown(self):
        """As long as something runs, something gets on."""
        while self.lent:
            self.take_back()
        while self.running:
            num_done = 0
            for sequence in list(self.running):
                try:
                    compute(sequence, min(AT_ONCE, sequence.num_uncomputed))
                    num_done += 1
                except OutOfBlocks:
                    continue
                if not sequence.num_uncomputed:
                    self.running.remove(sequence)
                    sequence.release()
            assert num_done
        assert self.pool.num_held == self.pool.num_promised == 0

    def all_held(self) -> list[int]:
        owned = [b for sequence in self.running for group in sequence.groups for b in group.blocks]
        return owned + [b for lent in self.lent for b in lent]


TestSequenceMachine = SequenceMachine.TestCase
TestSequenceMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

"""Channels within memory: the least recently used idle ones make room, busy ones never do."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.pair_book import PairBook


def test_the_least_recently_used_idle_channel_makes_room():
    book = PairBook(budget_bytes=30, idle_timeout_s=100)
    for at, name in enumerate("abc"):
        book.open(name, 10, float(at))
    book.use("a")
    book.use("b")
    book.rest("b", 5.0)
    assert book.victims(10, 6.0) == ["c"]
    assert book.victims(20, 6.0) == ["c", "b"]
    assert book.victims(30, 6.0) == ["c", "b"], "a carries a slab"
    assert not book.fits(10)
    book.close("c")
    assert book.fits(10)


def test_channels_idle_too_long_go_though_there_is_room():
    book = PairBook(budget_bytes=100, idle_timeout_s=10)
    book.open("old", 10, 0.0)
    book.open("new", 10, 8.0)
    assert book.victims(10, 11.0) == ["old"]


def test_a_channel_that_was_just_made_gets_the_time_for_its_first_slab():
    book = PairBook(budget_bytes=20, idle_timeout_s=100, fresh_s=2)
    book.open("old", 10, 0.0)
    book.use("old")
    book.rest("old", 1.5)
    book.open("new", 10, 1.0)
    assert book.victims(20, 2.0) == ["old"]
    assert book.victims(20, 3.0) == ["new", "old"]


class PairBookModel(RuleBasedStateMachine):
    """Every order of open, use, rest, close: never above the budget, never a busy victim."""

    def __init__(self) -> None:
        super().__init__()
        self.book = PairBook(budget_bytes=50, idle_timeout_s=7)
        self.users: dict[int, int] = {}
        self.now = 0.0
        self.next_key = 0

    @rule(num_bytes=st.integers(1, 60), step=st.integers(0, 5))
    def open(self, num_bytes, step):
        self.now += step
        for victim in self.book.victims(num_bytes, self.now):
            assert not self.users.pop(victim)
            self.book.close(victim)
        if self.book.fits(num_bytes):
            self.book.open(self.next_key, num_bytes, self.now)
            self.users[self.next_key] = 0
            self.next_key += 1
        else:
            assert num_bytes > 50 or any(self.users.values())

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def use(self, data):
        key = data.draw(st.sampled_from(sorted(self.users)))
        self.book.use(key)
        self.users[key] += 1

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def rest(self, data):
        key = data.draw(st.sampled_from([k for k, n in self.users.items() if n]))
        self.now += 1
        self.book.rest(key, self.now)
        self.users[key] -= 1

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def close(self, data):
        """A channel that fails ends while slabs of it still come back."""
        key = data.draw(st.sampled_from(sorted(self.users)))
        self.book.close(key)
        for _ in range(self.users.pop(key)):
            self.book.rest(key, self.now)

    @invariant()
    def balances(self):
        self.book.validate()
        assert len(self.book) == len(self.users)


TestPairBook = PairBookModel.TestCase
TestPairBook.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

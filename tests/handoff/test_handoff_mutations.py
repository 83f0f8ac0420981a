"""Each rule of the books is broken once, and the random lives must notice it."""

import pytest

from core import compiled, kv_groups
from core.errors import InvalidParameter, StaleMessage
from core.kv_groups import KVGroup
from decode_worker import shared_prefixes
from decode_worker.handoffs import Handoffs
from engine import group_blocks
from engine.block_pool import BlockPool
from kv_transfer.lease_book import LeaseBook, LeaseState, announced_blocks
from tests.handoff.handoff_model import WindowedHandoffModel
from tests.handoff.random_handoffs import run_random

pytestmark = pytest.mark.skipif(compiled.found_build() is not None, reason="compiled classes cannot be broken")


def forget_writers(monkeypatch):
    monkeypatch.setattr(BlockPool, "begin_write", lambda self, blocks: None)
    monkeypatch.setattr(BlockPool, "end_write", lambda self, blocks: None)


def forget_readers(monkeypatch):
    monkeypatch.setattr(BlockPool, "begin_read", lambda self, blocks: None)
    monkeypatch.setattr(BlockPool, "end_read", lambda self, blocks: None)


def free_before_quiet(monkeypatch):
    """Decode frees the blocks of an ended attempt while a fetch still writes them."""
    end = Handoffs.end

    def end_at_once(self, request_id, attempt, now):
        handoff = end(self, request_id, attempt, now)
        if handoff is not None:
            for number, blocks in handoff.writing.items():
                self._pool.end_write(blocks)
                handoff.writing[number] = []
        return handoff

    monkeypatch.setattr(Handoffs, "end", end_at_once)


def ignore_attempts(monkeypatch):
    def current(self, request_id, attempt, lease_id):
        if request_id not in self._leases:
            raise StaleMessage("unknown")
        return self._leases[request_id]

    monkeypatch.setattr(LeaseBook, "_current", current)


def complete_too_early(monkeypatch):
    """A commit counts as the last byte."""

    def complete(self, lease):
        if lease.state is LeaseState.COMMITTED and len(lease.announced) == lease.commit.num_announcements:
            lease.to(LeaseState.COMPLETE)

    monkeypatch.setattr(LeaseBook, "_complete_if_whole", complete)


def commit_twice(monkeypatch):
    """A repeated commit is taken for another one."""
    commit = LeaseBook.commit

    def commit_again(self, message):
        lease = self.find(message.request_id)
        if lease is not None and lease.commit == message:
            lease.commit = None
        return commit(self, message)

    monkeypatch.setattr(LeaseBook, "commit", commit_again)


def share_half_a_block(monkeypatch):
    """A block whose first layer has come is given to those who await it."""
    fetched = LeaseBook.fetched

    def fetched_some(self, lease, number):
        fetched(self, lease, number)
        return announced_blocks(lease.announced[number])

    monkeypatch.setattr(LeaseBook, "fetched", fetched_some)


def give_back_too_early(monkeypatch):
    """A block that the next token still sees counts as behind the window."""
    first_needed = KVGroup.first_needed

    def one_more(self, num_tokens, block_size):
        return first_needed(self, num_tokens + block_size * (self.window is not None), block_size)

    monkeypatch.setattr(KVGroup, "first_needed", one_more)


def mix_groups_up(monkeypatch):
    """A cached block is taken for that of any KV group."""
    for module in (group_blocks, kv_groups, shared_prefixes):
        monkeypatch.setattr(module, "in_group", lambda block_hash, group: block_hash)


@pytest.mark.parametrize(
    "mutation", [give_back_too_early, mix_groups_up, forget_readers, complete_too_early, share_half_a_block]
)
def test_the_model_with_windows_catches(mutation, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError, InvalidParameter)):
        for seed in range(40):
            run_random(seed, 1500, WindowedHandoffModel).teardown()


@pytest.mark.parametrize(
    "mutation",
    [
        forget_writers,
        forget_readers,
        free_before_quiet,
        ignore_attempts,
        complete_too_early,
        commit_twice,
        share_half_a_block,
    ],
)
def test_the_model_catches(mutation, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError, InvalidParameter)):
        for seed in range(40):
            run_random(seed, 1500).teardown()

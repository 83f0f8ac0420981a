"""A prefix that several open requests share is sent once: one's transfer brings it, the others wait and take it. Pure.

awaited --arrived with the other's transfer--> taken
        --the other ended, or stalls: orphan, asks its source once its own prefill is done--claim--> taken
"""

from collections.abc import Sequence

from core.block_hash import in_group
from core.kv_groups import KVGroup, LogicalBlock, chain_key
from core.messages.to_decode import Open
from decode_worker.coming import ComingBlocks, Key
from decode_worker.handoff import Awaited, Handoff
from engine.block_pool import BlockPool
from engine.group_blocks import GroupBlocks


class SharedPrefixes:
    """Which open handoff brings which block, and who else takes it."""

    def __init__(self, pool: BlockPool, groups: Sequence[KVGroup]) -> None:
        self._pool = pool
        self._groups = groups
        self._coming: ComingBlocks[Handoff] = ComingBlocks()
        self._owed: list[Handoff] = []

    def on_the_way(self, message: Open, held: Sequence[GroupBlocks]) -> tuple[Awaited, ...]:
        """By KV group, the prompt's blocks after those that are held that others' transfers are bringing already."""
        return tuple(
            self._coming.prefix(_keys(message, number, blocks.end, None)) for number, blocks in enumerate(held)
        )

    def enter(self, handoff: Handoff, awaited: tuple[Awaited, ...]) -> None:
        """It waits for `awaited`, and brings what it misses unless another does."""
        handoff.shared.awaited = awaited
        expected: dict[LogicalBlock, Key] = {}
        for number, (coming, missing) in enumerate(zip(awaited, handoff.lease.missing, strict=True)):
            self._coming.wait(handoff, coming)
            keys = _keys(handoff.message, number, missing.start, missing.stop)
            fresh = set(self._coming.expect(keys))
            expected |= {(number, block): key for block, key in enumerate(keys, missing.start) if key in fresh}
        handoff.shared.expected = expected

    def arrived(self, handoff: Handoff, block: LogicalBlock) -> list[Handoff]:
        """A logical block is whole: it can be found by its content; returns those who waited and own it now too."""
        key = handoff.shared.expected.pop(block, None)
        if key is None:
            return []
        (number, index), physical = block, handoff.lease.bound[block]
        hashes = handoff.message.sequence.block_hashes
        self._pool.register(physical, *chain_key(hashes, number, self._groups[number], index))
        waiters = self._coming.settle(key)
        for waiter in waiters:
            self._pool.own([physical])
            waiter.shared.taken[key] = physical
        return waiters

    def leave(self, handoff: Handoff) -> None:
        """It is over; who waits for what it has not brought is left without."""
        for awaited in handoff.shared.awaited:
            self._coming.forget(handoff, awaited)
        orphans = [waiter for key in handoff.shared.expected.values() for waiter in self._coming.settle(key)]
        handoff.shared.expected = {}
        for orphan in dict.fromkeys(orphans):
            orphan.shared.is_orphan = True
            self.ask_for_owed(orphan)

    def stop_waiting(self, handoff: Handoff) -> None:
        """It no longer waits for another's transfer, which may stall."""
        if self._coming.awaits(handoff, handoff.shared.owed):
            handoff.shared.is_orphan = True
            self.ask_for_owed(handoff)

    def ask_for_owed(self, handoff: Handoff) -> None:
        """To be called when prefill is done, too: only then has the source all blocks of the prompt."""
        if handoff.shared.is_orphan and handoff.lease.commit is not None:
            handoff.shared.is_orphan = False
            self._coming.forget(handoff, handoff.shared.owed)
            self._owed.append(handoff)

    def take_owed(self) -> list[Handoff]:
        """Those that are to get what is owed from their source, since the last call; some may be over."""
        owed, self._owed = self._owed, []
        return owed

    def claim(self, handoff: Handoff) -> bool:
        """Takes owed blocks from the cache; False when one is not there."""
        for key in handoff.shared.owed:
            found = self._pool.match([key[1]])
            if not found:
                return False
            self._pool.own(found)
            handoff.shared.taken[key] = found[0]
        return True

    def validate(self, live: list[Handoff]) -> None:
        """Raises AssertionError when a block is expected from nobody, or from two."""
        assert len(self._coming) == sum(len(handoff.shared.expected) for handoff in live)


def _keys(message: Open, group: int, start: int, stop: int | None) -> tuple[Key, ...]:
    """The prompt's full blocks of a KV group from `start` on, as they come from its prefill replica."""
    source_id = message.prefill.replica_id if message.prefill is not None else ""
    return tuple((source_id, in_group(block_hash, group)) for block_hash in message.sequence.block_hashes[start:stop])

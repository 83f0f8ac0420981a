"""The physical blocks of handoffs: found in the cache, promised, bound when bytes come, given back. Pure."""

from core.errors import Overloaded, PromptTooLong
from core.kv_layout import KVLayout
from core.messages.to_decode import Announce, Open
from decode_worker.handoff import Awaited, Handoff
from decode_worker.shared_prefixes import SharedPrefixes
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence
from kv_transfer.lease_book import LeaseBook, announced_blocks


class HandoffBlocks:
    """Moves blocks between the pool and the leases."""

    def __init__(
        self, pool: BlockPool, layout: KVLayout, num_at_once: int, book: LeaseBook, prefixes: SharedPrefixes
    ) -> None:
        """`num_at_once` as for Handoffs."""
        self._pool = pool
        self._layout = layout
        self._num_at_once = num_at_once
        self._book = book
        self._prefixes = prefixes

    def acquire(self, message: Open) -> tuple[ActiveSequence, tuple[Awaited, ...], tuple[range, ...]]:
        """Owns the blocks that are cached and promises those that shall come: the last result, logical ones by KV
        group. Between them is what follows the cached ones and is on its way already.

        Without a prefill replica all blocks are taken at once. Raises Overloaded, PromptTooLong.
        """
        sequence = ActiveSequence(self._pool, self._layout, message.sequence)
        num_at_once = self._num_at_once if message.prefill is None else 1
        if self._layout.num_blocks_held(sequence.num_prompt + 1, num_at_once) > self._pool.num_blocks:
            limit = self._layout.longest_within(self._pool.num_blocks, num_at_once, sequence.num_prompt)
            raise PromptTooLong(f"the prompt has {sequence.num_prompt} tokens, this replica's KV cache holds {limit}")
        end = self._layout.num_blocks_for(sequence.num_prompt)
        try:
            if message.prefill is None:
                sequence.acquire_prefix()
                sequence.reserve(num_at_once)
                return sequence, (), (range(end, end),) * len(sequence.groups)
            sequence.acquire_received()
            awaited = self._prefixes.on_the_way(message, sequence.groups)
            missing = tuple(
                range(blocks.end + len(coming), end) for blocks, coming in zip(sequence.groups, awaited, strict=True)
            )
            self._pool.promise(sum(map(len, missing)))
        except OutOfBlocks as error:
            sequence.release()
            raise Overloaded(f"KV cache of this decode replica is full: {error}", retry_after_s=1.0) from error
        return sequence, awaited, missing

    def begin_write(self, handoff: Handoff, announce: Announce) -> tuple[int, ...]:
        """Binds the announced blocks that have no place yet; returns the places of all of them."""
        lease = handoff.lease
        blocks = announced_blocks(announce)
        unbound = [block for block in blocks if block not in lease.bound]
        if unbound:
            self._book.bind(lease, unbound, self._pool.allocate(len(unbound), promised=True))
        destination = [lease.bound[block] for block in blocks]
        self._pool.begin_write(destination)
        handoff.writing[announce.number] = destination
        return tuple(destination)

    def end_write(self, handoff: Handoff, number: int) -> None:
        """The fetch of an announcement writes no more."""
        self._pool.end_write(handoff.writing.pop(number))

    def give_back(self, handoff: Handoff) -> None:
        """Of an attempt that never joined the batch; those that arrived whole stay cached for the next attempt."""
        self._pool.unpromise(handoff.lease.num_unbound)
        for group in range(len(self._layout.kv_groups)):
            self._pool.disown(handoff.arrived_blocks(group))
        handoff.sequence.release()

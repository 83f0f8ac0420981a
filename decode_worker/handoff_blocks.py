"""The physical blocks of handoffs: found in the cache, promised, bound when bytes come, given back. Pure."""

from core.errors import Overloaded, PromptTooLong
from core.messages.to_decode import Announce, Open
from decode_worker.coming import Key
from decode_worker.handoff import Handoff
from decode_worker.shared_prefixes import SharedPrefixes
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence
from kv_transfer.lease_book import LeaseBook


class HandoffBlocks:
    """Moves blocks between the pool and the leases."""

    def __init__(self, pool: BlockPool, block_size: int, book: LeaseBook, prefixes: SharedPrefixes) -> None:
        self._pool = pool
        self._block_size = block_size
        self._book = book
        self._prefixes = prefixes

    def acquire(self, message: Open) -> tuple[ActiveSequence, tuple[Key, ...]]:
        """Owns the cached prefix and promises the rest; also returns what follows the prefix and is on its way already.

        Without a prefill replica all blocks are allocated at once. Raises Overloaded, PromptTooLong.
        """
        sequence = ActiveSequence(self._pool, self._block_size, message.sequence)
        is_local = message.prefill is None
        if -(-(sequence.num_prompt + 1) // self._block_size) > self._pool.num_blocks:
            limit = self._pool.num_blocks * self._block_size
            raise PromptTooLong(f"the prompt has {sequence.num_prompt} tokens, this replica's KV cache holds {limit}")
        try:
            sequence.acquire_prefix(keep_last=is_local)
            if is_local:
                sequence.grow(sequence.num_prompt)
                return sequence, ()
            awaited = self._prefixes.on_the_way(message, len(sequence.blocks))
            self._pool.promise(sequence.num_blocks_to_hold(sequence.num_prompt) - len(awaited))
        except OutOfBlocks as error:
            sequence.release()
            raise Overloaded(f"KV cache of this decode replica is full: {error}", retry_after_s=1.0) from error
        return sequence, awaited

    def begin_write(self, handoff: Handoff, announce: Announce) -> tuple[int, ...]:
        """Binds the announced blocks that have no place yet; returns the places of all of them."""
        lease = handoff.lease
        blocks = range(announce.first_block, announce.first_block + len(announce.source_blocks))
        unbound = [block for block in blocks if block not in lease.bound]
        if unbound:
            fresh = self._pool.allocate(len(unbound), promised=True)
            for block, physical in zip(unbound, fresh, strict=True):
                self._book.bind(lease, range(block, block + 1), [physical])
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
        self._pool.disown(handoff.shared.blocks + [block for _, block in sorted(handoff.lease.bound.items())])
        handoff.sequence.release()

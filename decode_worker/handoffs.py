"""Requests on decode from Open to their end: leases, blocks that arrive, joining the batch, who may forget what. Pure.

Open -> lease --announce--> bind, Fetch order --fetched--> ... --commit, all arrived--> joins the scheduler
                                                 any end --> Release to prefill once no fetch is in flight
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from core.errors import Overloaded, PromptTooLong
from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import Announce, Commit, Open
from core.messages.to_rank import Fetched
from decode_worker.coming import ComingBlocks, Key
from decode_worker.scheduler import DecodeJob, DecodeScheduler
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence
from kv_transfer.lease_book import Lease, LeaseBook, LeaseState


@dataclass
class HandoffTimes:
    """Moments of a handoff on the caller's clock; 0 while they have not come."""

    opened_at: float
    first_announced_at: float = 0.0
    committed_at: float = 0.0
    completed_at: float = 0.0
    first_token_at: float = 0.0


@dataclass(eq=False)
class Handoff:
    """One attempt's lease, sequence and source."""

    message: Open
    lease: Lease
    sequence: ActiveSequence
    times: HandoffTimes
    source: ReplicaInfo | None
    writing: dict[int, list[int]] = field(default_factory=dict)  # announcement number -> physical blocks in flight
    transfer_bytes: int = 0
    fetching_s: float = 0.0
    job: DecodeJob | None = None  # once it joined the batch
    num_reused_blocks: int = 0  # found in decode's own prefix cache
    expected: dict[int, Key] = field(default_factory=dict)  # logical blocks that others may take when they come
    awaited: tuple[Key, ...] = ()  # brought by another request's transfer, in logical order
    taken: dict[Key, int] = field(default_factory=dict)  # of these, where those lie that have come
    is_orphan: bool = False  # the other transfer ended before all of them came, and nobody was asked for the rest yet

    @property
    def key(self) -> tuple[str, int]:
        """(request id, attempt)."""
        return self.message.request_id, self.message.attempt

    @property
    def owed(self) -> tuple[Key, ...]:
        """Awaited blocks that have not come, from the first one on."""
        return tuple(key for key in self.awaited if key not in self.taken)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.message.request_id


@dataclass(frozen=True)
class Fetch:
    """Instruction: bring the bytes of one announcement into these physical blocks."""

    handoff: Handoff
    announce: Announce
    destination_blocks: tuple[int, ...]
    due_s: float  # until the request's client should have its first tokens


class Handoffs:
    """The intake of a decode replica."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        book: LeaseBook,
        scheduler: DecodeScheduler,
        limit: int,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._book = book
        self._scheduler = scheduler
        self._limit = limit
        self._live: dict[str, Handoff] = {}
        self._coming: ComingBlocks[Handoff] = ComingBlocks()
        self._owed: list[Handoff] = []
        self._releasable: list[Handoff] = []  # ended or complete, nothing in flight: tell prefill, then forget
        self._joined: list[Handoff] = []

    def __iter__(self) -> Iterator[Handoff]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def find(self, request_id: str, attempt: int) -> Handoff | None:
        """The live handoff of exactly this attempt."""
        handoff = self._live.get(request_id)
        return handoff if handoff is not None and handoff.message.attempt == attempt else None

    def open(self, message: Open, now: float) -> Handoff:
        """Pins cached blocks and promises the rest. Raises Overloaded, PromptTooLong, StaleMessage."""
        known = self.find(message.request_id, message.attempt)
        if known is not None:
            return known
        self._book.refuse_stale(message.request_id, message.attempt)
        if len(self._live) >= self._limit:
            raise Overloaded(f"{self._limit} requests are open on this decode replica", retry_after_s=1.0)
        self.end(message.request_id, message.attempt - 1, now)
        sequence = ActiveSequence(self._pool, self._block_size, message.sequence)
        awaited = self._take_blocks(sequence, message)
        num_blocks = -(-sequence.num_prompt // self._block_size)
        num_here = len(sequence.blocks) + len(awaited)
        lease = self._book.open(message.request_id, message.attempt, num_here, num_blocks, now)
        handoff = Handoff(message, lease, sequence, HandoffTimes(now), message.prefill)
        handoff.num_reused_blocks = sequence.num_cached // self._block_size + len(awaited)
        self._live[message.request_id] = handoff
        if message.prefill is None:
            self._book.complete_here(lease)
            self._join(handoff)
        else:
            handoff.awaited = awaited
            self._coming.wait(handoff, awaited)
            keys = _keys(message)
            fresh = set(self._coming.expect(keys[num_here:]))
            handoff.expected = {block: key for block, key in enumerate(keys) if block >= num_here and key in fresh}
        return handoff

    def announce(self, message: Announce, now: float) -> Fetch | None:
        """What to fetch for an announcement; None for a repeated one. Raises StaleMessage, InvalidParameter."""
        lease = self._book.announce(message)
        if lease is None:
            return None
        handoff = self._live[message.request_id]
        blocks = range(message.first_block, message.first_block + len(message.source_blocks))
        unbound = [block for block in blocks if block not in lease.bound]
        if unbound:
            fresh = self._pool.allocate(len(unbound), promised=True)
            for block, physical in zip(unbound, fresh, strict=True):
                self._book.bind(lease, range(block, block + 1), [physical])
        destination = [lease.bound[block] for block in blocks]
        self._pool.begin_write(destination)
        handoff.writing[message.number] = destination
        handoff.times.first_announced_at = handoff.times.first_announced_at or now
        due_s = max(0.0, handoff.times.opened_at + handoff.message.due_s - now)
        return Fetch(handoff, message, tuple(destination), due_s)

    def fetched(self, handoff: Handoff, number: int, result: Fetched, now: float) -> None:
        """All bytes of an announcement are in place, on every rank."""
        self._pool.end_write(handoff.writing.pop(number))
        handoff.transfer_bytes += result.num_bytes
        handoff.fetching_s += result.seconds
        if handoff.lease.state is LeaseState.ENDED:
            self._release_when_quiet(handoff)
            return
        for block in self._book.fetched(handoff.lease, number):
            self._arrived(handoff, block, now)
        self._join_if_complete(handoff, now)

    def fetch_failed(self, handoff: Handoff, number: int, now: float) -> bool:
        """A fetch gave up and writes no more. Ends the attempt; False when it had ended before."""
        self._pool.end_write(handoff.writing.pop(number))
        was_live = handoff.lease.state is not LeaseState.ENDED
        self.end(handoff.request_id, handoff.message.attempt, now)
        self._release_when_quiet(handoff)
        return was_live

    def commit(self, message: Commit, now: float) -> Handoff:
        """Prefill's closing message. Raises StaleMessage."""
        lease = self._book.commit(message)
        handoff = self._live[lease.request_id]
        handoff.times.committed_at = handoff.times.committed_at or now
        self._ask_for_owed(handoff)
        self._join_if_complete(handoff, now)
        return handoff

    def end(self, request_id: str, attempt: int, now: float) -> Handoff | None:
        """Ends this and lower attempts in any state, also ones still to come; idempotent."""
        lease = self._book.end(request_id, attempt, now)
        if lease is None:
            return None
        handoff = self._live.pop(request_id)
        self._coming.forget(handoff, handoff.awaited)
        if handoff.job is not None:
            self._scheduler.cancel(request_id, attempt)
        else:
            self._give_back(handoff)
        orphans = [waiter for key in handoff.expected.values() for waiter in self._coming.settle(key)]
        handoff.expected = {}
        for orphan in dict.fromkeys(orphans):
            orphan.is_orphan = True
            self._ask_for_owed(orphan)
        self._release_when_quiet(handoff)
        return handoff

    def renew(self, request_ids: tuple[str, ...], now: float) -> tuple[str, ...]:
        """Renews leases; returns the unknown ones."""
        return tuple(request_id for request_id in request_ids if not self._book.renew(request_id, now))

    def end_expired(self, now: float) -> list[Handoff]:
        """Ends the leases that nobody renewed."""
        expired = self._book.expired(now)
        return [h for lease in expired if (h := self.end(lease.request_id, lease.attempt, now)) is not None]

    def take_releasable(self) -> list[Handoff]:
        """Handoffs whose source may free its blocks."""
        releasable, self._releasable = self._releasable, []
        return releasable

    def take_owed(self) -> list[Handoff]:
        """Handoffs that another's transfer left without blocks that they await, and whose source has computed them.

        The caller brings those into the cache and calls `claim`.
        """
        owed, self._owed = self._owed, []
        return [handoff for handoff in owed if self._is_live(handoff)]

    def stop_waiting(self, now: float, limit_s: float) -> None:
        """Handoffs whose prefill has been done for `limit_s` no longer wait for another's transfer, which may stall."""
        for handoff in self._live.values():
            late = handoff.lease.commit is not None and now - handoff.times.committed_at >= limit_s
            if late and self._coming.awaits(handoff, handoff.owed):
                handoff.is_orphan = True
                self._ask_for_owed(handoff)

    def claim(self, handoff: Handoff, now: float) -> bool:
        """Takes owed blocks from the cache; False when one is not there, or the handoff is over."""
        if not self._is_live(handoff):
            return False
        for key in handoff.owed:
            found = self._pool.match([key[1]])
            if not found:
                return False
            self._pool.own(found)
            handoff.taken[key] = found[0]
        self._join_if_complete(handoff, now)
        return True

    def take_joined(self) -> list[Handoff]:
        """Handoffs that joined the batch since the last call."""
        joined, self._joined = self._joined, []
        return joined

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        self._pool.validate()
        self._book.validate()
        assert self._pool.num_promised == sum(h.lease.num_unbound for h in self._live.values())
        assert len(self._coming) == sum(len(h.expected) for h in self._live.values())

    def _take_blocks(self, sequence: ActiveSequence, message: Open) -> tuple[Key, ...]:
        """Owns the cached prefix and promises the rest; returns what follows the prefix and is on its way already."""
        is_local = message.prefill is None
        if -(-(sequence.num_prompt + 1) // self._block_size) > self._pool.num_blocks:
            limit = self._pool.num_blocks * self._block_size
            raise PromptTooLong(f"the prompt has {sequence.num_prompt} tokens, this replica's KV cache holds {limit}")
        try:
            sequence.acquire_prefix(keep_last=is_local)
            if is_local:
                sequence.grow(sequence.num_prompt)
                return ()
            awaited = self._coming.prefix(_keys(message)[len(sequence.blocks) :])
            self._pool.promise(sequence.num_blocks_to_hold(sequence.num_prompt) - len(awaited))
        except OutOfBlocks as error:
            sequence.release()
            raise Overloaded(f"KV cache of this decode replica is full: {error}", retry_after_s=1.0) from error
        return awaited

    def _is_live(self, handoff: Handoff) -> bool:
        return self._live.get(handoff.request_id) is handoff

    def _ask_for_owed(self, handoff: Handoff) -> None:
        """Once prefill is done the source has all blocks of the prompt."""
        if handoff.is_orphan and handoff.lease.commit is not None:
            handoff.is_orphan = False
            self._coming.forget(handoff, handoff.owed)
            self._owed.append(handoff)

    def _arrived(self, handoff: Handoff, block: int, now: float) -> None:
        """A logical block is whole: it can be found by its content, and who waited for it owns it too."""
        key = handoff.expected.pop(block, None)
        if key is None:
            return
        hashes, physical = handoff.message.sequence.block_hashes, handoff.lease.bound[block]
        self._pool.register(physical, hashes[block], hashes[block - 1] if block else None)
        for waiter in self._coming.settle(key):
            self._pool.own([physical])
            waiter.taken[key] = physical
            self._join_if_complete(waiter, now)

    def _join_if_complete(self, handoff: Handoff, now: float) -> None:
        lease = handoff.lease
        if (
            lease.state is not LeaseState.COMPLETE
            or handoff.job is not None
            or len(handoff.taken) < len(handoff.awaited)
        ):
            return
        assert lease.commit is not None
        handoff.times.completed_at = now
        blocks = [lease.bound[block] for block in range(lease.first_missing_block, lease.num_blocks)]
        shared = [handoff.taken[key] for key in handoff.awaited]
        handoff.sequence.adopt(shared + blocks, handoff.sequence.num_prompt)
        handoff.sequence.append(lease.commit.first_token)
        self._join(handoff)
        self._releasable.append(handoff)

    def _join(self, handoff: Handoff) -> None:
        handoff.job = DecodeJob(handoff.request_id, handoff.message.attempt, handoff.sequence)
        self._scheduler.add(handoff.job)
        self._joined.append(handoff)

    def _give_back(self, handoff: Handoff) -> None:
        """Blocks of an attempt that never joined; those that arrived whole stay cached for the next attempt."""
        self._pool.unpromise(handoff.lease.num_unbound)
        shared = [handoff.taken[key] for key in handoff.awaited if key in handoff.taken]
        self._pool.disown(shared + [block for _, block in sorted(handoff.lease.bound.items())])
        handoff.sequence.release()

    def _release_when_quiet(self, handoff: Handoff) -> None:
        is_over = handoff.lease.state is LeaseState.ENDED and handoff.times.completed_at == 0
        if is_over and not handoff.writing and handoff.source is not None and handoff not in self._releasable:
            self._releasable.append(handoff)


def _keys(message: Open) -> tuple[Key, ...]:
    """The prompt's full blocks, as they come from its prefill replica."""
    source_id = message.prefill.replica_id if message.prefill is not None else ""
    return tuple((source_id, block_hash) for block_hash in message.sequence.block_hashes)

"""Requests on decode from Open to their end: leases, blocks that arrive, joining the batch, who may forget what. Pure.

Open -> lease --announce--> bind, Fetch order --fetched--> ... --commit, all arrived--> joins the scheduler
                                                 any end --> Release to prefill once no fetch is in flight
"""

from collections.abc import Iterator

from core.errors import Overloaded
from core.kv_layout import KVLayout
from core.messages.to_decode import Announce, Commit, Open
from core.messages.to_rank import Fetched
from decode_worker.handoff import Fetch, Handoff, HandoffTimes
from decode_worker.handoff_blocks import HandoffBlocks
from decode_worker.scheduler import DecodeJob, DecodeScheduler
from decode_worker.shared_prefixes import SharedPrefixes
from engine.block_pool import BlockPool
from kv_transfer.lease_book import LeaseBook, LeaseState


class Handoffs:
    """The books of a decode replica. After any change the caller carries out what the `take_...` methods hand over."""

    def __init__(
        self,
        pool: BlockPool,
        layout: KVLayout,
        book: LeaseBook,
        scheduler: DecodeScheduler,
        limit: int,
        num_at_once: int,
    ) -> None:
        """`num_at_once`: tokens of one prompt at most that steps in flight compute."""
        self._pool = pool
        self._book = book
        self._scheduler = scheduler
        self._limit = limit
        self._live: dict[str, Handoff] = {}
        self._prefixes = SharedPrefixes(pool, layout.kv_groups)
        self._blocks = HandoffBlocks(pool, layout, num_at_once, book, self._prefixes)
        self._releasable: list[Handoff] = []  # ended or complete, nothing in flight: tell prefill, then forget
        self._joined: list[Handoff] = []

    def __iter__(self) -> Iterator[Handoff]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def find(self, request_id: str, attempt: int) -> Handoff | None:
        """The live handoff of exactly this attempt."""
        handoff = self._live.get(request_id)
        return handoff if handoff is not None and handoff.attempt == attempt else None

    def open(self, message: Open, now: float) -> Handoff:
        """Pins cached blocks and promises the rest. Raises Overloaded, PromptTooLong, StaleMessage."""
        known = self.find(message.request_id, message.attempt)
        if known is not None:
            return known
        self._book.refuse_stale(message.request_id, message.attempt)
        if len(self._live) >= self._limit:
            raise Overloaded(f"{self._limit} requests are open on this decode replica", retry_after_s=1.0)
        self.end(message.request_id, message.attempt - 1, now)
        sequence, awaited, missing = self._blocks.acquire(message)
        lease = self._book.open(message.request_id, message.attempt, missing, now)
        handoff = Handoff(message, lease, sequence, HandoffTimes(now), message.prefill)
        handoff.num_reused_blocks = sequence.num_acquired
        self._live[message.request_id] = handoff
        if message.prefill is None:
            self._book.complete_here(lease)
            self._join(handoff)
        else:
            self._prefixes.enter(handoff, awaited)
            handoff.num_reused_blocks += handoff.shared.num_awaited
        return handoff

    def announce(self, message: Announce, now: float) -> Fetch | None:
        """What to fetch for an announcement; None for a repeated one. Raises StaleMessage, InvalidParameter."""
        lease = self._book.announce(message)
        if lease is None:
            return None
        handoff = self._live[message.request_id]
        destination_blocks = self._blocks.begin_write(handoff, message)
        handoff.times.first_announced_at = handoff.times.first_announced_at or now
        due_s = max(0.0, handoff.times.opened_at + handoff.message.due_s - now)
        return Fetch(handoff, message, destination_blocks, due_s)

    def fetched(self, handoff: Handoff, number: int, result: Fetched, now: float) -> None:
        """All bytes of an announcement are in place, on every rank."""
        self._blocks.end_write(handoff, number)
        handoff.transfer_bytes += result.num_bytes
        handoff.fetching_s += result.seconds
        if handoff.lease.state is LeaseState.ENDED:
            self._release_when_quiet(handoff)
            return
        for block in self._book.fetched(handoff.lease, number):
            for waiter in self._prefixes.arrived(handoff, block):
                self._join_if_complete(waiter, now)
        self._join_if_complete(handoff, now)

    def fetch_failed(self, handoff: Handoff, number: int, now: float) -> bool:
        """A fetch gave up and writes no more. Ends the attempt; False when it had ended before."""
        self._blocks.end_write(handoff, number)
        was_live = handoff.lease.state is not LeaseState.ENDED
        self.end(*handoff.key, now)
        self._release_when_quiet(handoff)
        return was_live

    def commit(self, message: Commit, now: float) -> Handoff:
        """Prefill's closing message. Raises StaleMessage."""
        lease = self._book.commit(message)
        handoff = self._live[lease.request_id]
        handoff.times.committed_at = handoff.times.committed_at or now
        self._prefixes.ask_for_owed(handoff)
        self._join_if_complete(handoff, now)
        return handoff

    def end(self, request_id: str, attempt: int, now: float) -> Handoff | None:
        """Ends this and lower attempts in any state, also ones still to come; idempotent."""
        lease = self._book.end(request_id, attempt, now)
        if lease is None:
            return None
        handoff = self._live.pop(request_id)
        if handoff.job is not None:
            self._scheduler.cancel(request_id, attempt)
        else:
            self._blocks.give_back(handoff)
        self._prefixes.leave(handoff)
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
        return [handoff for handoff in self._prefixes.take_owed() if self._is_live(handoff)]

    def stop_waiting(self, now: float, limit_s: float) -> None:
        """Handoffs whose prefill has been done for `limit_s` no longer wait for another's transfer, which may stall."""
        for handoff in self._live.values():
            if handoff.lease.commit is not None and now - handoff.times.committed_at >= limit_s:
                self._prefixes.stop_waiting(handoff)

    def claim(self, handoff: Handoff, now: float) -> bool:
        """Takes owed blocks from the cache; False when one is not there, or the handoff is over."""
        if not self._is_live(handoff) or not self._prefixes.claim(handoff):
            return False
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
        live = self._live.values()
        assert self._pool.num_promised == sum(h.lease.num_unbound + h.sequence.num_promised for h in live)
        self._prefixes.validate(list(self._live.values()))

    def _is_live(self, handoff: Handoff) -> bool:
        return self._live.get(handoff.request_id) is handoff

    def _join_if_complete(self, handoff: Handoff, now: float) -> None:
        lease = handoff.lease
        if lease.state is not LeaseState.COMPLETE or handoff.job is not None or handoff.shared.owed:
            return
        assert lease.commit is not None
        handoff.times.completed_at = now
        arrived = [handoff.arrived_blocks(group) for group in range(len(lease.missing))]
        handoff.sequence.adopt(arrived, handoff.sequence.num_prompt)
        self._book.pass_on(lease)
        handoff.sequence.append(lease.commit.first_token)
        self._join(handoff)
        self._releasable.append(handoff)

    def _join(self, handoff: Handoff) -> None:
        handoff.job = DecodeJob(*handoff.key, handoff.sequence)
        self._scheduler.add(handoff.job)
        self._joined.append(handoff)

    def _release_when_quiet(self, handoff: Handoff) -> None:
        is_over = handoff.lease.state is LeaseState.ENDED and handoff.times.completed_at == 0
        if is_over and not handoff.writing and handoff.source is not None and handoff not in self._releasable:
            self._releasable.append(handoff)

"""Decode's side of a handoff: what was promised to which attempt, what has arrived, who may still write. Pure.

A lease is a count of promised blocks; blocks are bound, logical to physical, when an announcement comes.

    OPEN --announce--> RECEIVING --commit--> COMMITTED --last fetch--> COMPLETE
      |  ---commit----------------------------> ^
      |  ---prefilled here: nothing will come ------------------------------> ^
      +-- cancel, expiry, abandon, failed fetch, newer attempt: any state --> ENDED

Every method that takes a message raises StaleMessage when its lease, attempt or request is over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

from core.errors import InvalidParameter, StaleMessage
from core.kv_groups import KVGroup, LogicalBlock
from core.messages.to_decode import Announce, Commit
from kv_transfer.tombstones import Tombstones


class LeaseState(StrEnum):
    """See the picture above."""

    OPEN = "open"
    RECEIVING = "receiving"
    COMMITTED = "committed"
    COMPLETE = "complete"
    ENDED = "ended"


_LEGAL = {
    LeaseState.OPEN: {LeaseState.RECEIVING, LeaseState.COMMITTED, LeaseState.COMPLETE, LeaseState.ENDED},
    LeaseState.RECEIVING: {LeaseState.COMMITTED, LeaseState.ENDED},
    LeaseState.COMMITTED: {LeaseState.COMPLETE, LeaseState.ENDED},
    LeaseState.COMPLETE: {LeaseState.ENDED},
    LeaseState.ENDED: set(),
}


@dataclass
class Lease:
    """The books of one attempt. Blocks here are logical unless named physical."""

    request_id: str
    attempt: int
    lease_id: int
    missing: tuple[range, ...]  # logical blocks that shall come, by KV group
    group_sizes: tuple[int, ...]  # layers, by KV group
    expires_at: float
    state: LeaseState = LeaseState.OPEN
    bound: dict[LogicalBlock, int] = field(default_factory=dict)  # logical -> physical
    arrived_layers: dict[LogicalBlock, int] = field(default_factory=dict)  # bit by layer of the group
    num_whole: int = 0  # missing blocks of which every layer is in place
    announced: dict[int, Announce] = field(default_factory=dict)  # by number
    in_flight: set[int] = field(default_factory=set)  # numbers of announcements being fetched
    commit: Commit | None = None

    @property
    def num_missing(self) -> int:
        """Blocks that shall come."""
        return sum(map(len, self.missing))

    @property
    def num_unbound(self) -> int:
        """Promised blocks that are not bound yet."""
        return 0 if self.state is LeaseState.COMPLETE else self.num_missing - len(self.bound)

    def has_all_layers(self, block: LogicalBlock) -> bool:
        """Whether every layer of a logical block is in place."""
        return self.arrived_layers.get(block, 0) == (1 << self.group_sizes[block[0]]) - 1

    def arrive(self, message: Announce) -> list[LogicalBlock]:
        """Takes in what an announcement brought; returns the blocks that this made whole."""
        arrived, completed = self.arrived_layers, []
        layers = ((1 << message.num_layers) - 1) << message.first_layer
        all_layers = (1 << self.group_sizes[message.group]) - 1
        for block in announced_blocks(message):
            before = arrived.get(block, 0)
            arrived[block] = after = before | layers
            if after == all_layers and before != after:
                completed.append(block)
        self.num_whole += len(completed)
        return completed

    def is_whole(self) -> bool:
        """Whether every layer of every missing block is in place."""
        return self.num_whole == self.num_missing

    def to(self, state: LeaseState) -> None:
        """The one door to another state."""
        assert state in _LEGAL[self.state], f"lease {self.lease_id}: {self.state} -> {state}"
        self.state = state

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        assert all(block in self.missing[group] for group, block in self.bound)
        assert len(set(self.bound.values())) == len(self.bound), "one physical block bound twice"
        assert self.in_flight <= self.announced.keys()
        blocks = ((group, block) for group, of_group in enumerate(self.missing) for block in of_group)
        assert self.num_whole == sum(map(self.has_all_layers, blocks))
        if self.state in (LeaseState.OPEN, LeaseState.RECEIVING):
            assert self.commit is None
        if self.state is LeaseState.COMPLETE:
            assert not self.in_flight and self.is_whole()


class LeaseBook:
    """All live leases of a decode replica, at most one per request."""

    def __init__(self, groups: Sequence[KVGroup], ttl_s: float) -> None:
        self._group_sizes = tuple(len(group.layers) for group in groups)
        self._ttl_s = ttl_s
        self._leases: dict[str, Lease] = {}
        self._tombstones = Tombstones()
        self._next_id = count(1)

    def __len__(self) -> int:
        return len(self._leases)

    def find(self, request_id: str) -> Lease | None:
        """The live lease of a request."""
        return self._leases.get(request_id)

    def refuse_stale(self, request_id: str, attempt: int) -> None:
        """Raises StaleMessage when an Open of this attempt comes too late: cancelled, ended or outnumbered."""
        self._tombstones.refuse(request_id, attempt)
        lease = self._leases.get(request_id)
        if lease is not None and attempt < lease.attempt:
            raise StaleMessage(f"attempt {attempt} of request {request_id} is behind {lease.attempt}")

    def open(self, request_id: str, attempt: int, missing: tuple[range, ...], now: float) -> Lease:
        """A new lease for these logical blocks, by KV group.

        The caller has ended the request's earlier attempt and holds the promise of the blocks.
        """
        self.refuse_stale(request_id, attempt)
        assert request_id not in self._leases, "end the earlier attempt first"
        lease = Lease(
            request_id,
            attempt,
            next(self._next_id),
            missing,
            self._group_sizes,
            expires_at=now + self._ttl_s,
        )
        self._leases[request_id] = lease
        return lease

    def announce(self, message: Announce) -> Lease | None:
        """Accepts an announcement; None for one already accepted. Raises StaleMessage, InvalidParameter."""
        lease = self._current(message.request_id, message.attempt, message.lease_id)
        if message.number in lease.announced:
            return None
        if not 0 <= message.group < len(lease.missing):
            raise InvalidParameter(f"KV group {message.group} of {len(lease.missing)}", field="group")
        missing, size = lease.missing[message.group], self._group_sizes[message.group]
        last = message.first_block + len(message.source_blocks)
        if not missing.start <= message.first_block < last <= missing.stop:
            raise InvalidParameter(
                f"blocks [{message.first_block}, {last}) are outside of the lease's [{missing.start}, {missing.stop})",
                field="first_block",
            )
        if not 0 <= message.first_layer < message.first_layer + message.num_layers <= size:
            raise InvalidParameter(f"layers beyond the {size} of KV group {message.group}", field="first_layer")
        if lease.state is LeaseState.OPEN:
            lease.to(LeaseState.RECEIVING)
        lease.announced[message.number] = message
        lease.in_flight.add(message.number)
        return lease

    def bind(self, lease: Lease, blocks: Sequence[LogicalBlock], physical: Sequence[int]) -> None:
        """Gives logical blocks their physical ones."""
        for block, target in zip(blocks, physical, strict=True):
            assert block not in lease.bound
            lease.bound[block] = target

    def pass_on(self, lease: Lease) -> None:
        """The blocks of a complete lease are its sequence's from here on."""
        assert lease.state is LeaseState.COMPLETE
        lease.bound.clear()

    def complete_here(self, lease: Lease) -> None:
        """Decode prefills by itself: nothing will be announced."""
        assert not lease.num_missing
        lease.to(LeaseState.COMPLETE)

    def fetched(self, lease: Lease, number: int) -> list[LogicalBlock]:
        """All bytes of an announcement are in place; returns the logical blocks that this completed."""
        message = lease.announced[number]
        lease.in_flight.discard(number)
        completed = lease.arrive(message)
        self._complete_if_whole(lease)
        return completed

    def commit(self, message: Commit) -> Lease:
        """The closing message of prefill; repeated ones change nothing. Raises StaleMessage, InvalidParameter."""
        lease = self._current(message.request_id, message.attempt, message.lease_id)
        if lease.commit is not None:
            return lease
        lease.commit = message
        lease.to(LeaseState.COMMITTED)
        self._complete_if_whole(lease)
        return lease

    def end(self, request_id: str, attempt: int, now: float) -> Lease | None:
        """Ends this and every lower attempt, whatever their state, also before they opened; idempotent."""
        self._tombstones.bury(request_id, attempt, now)
        lease = self._leases.get(request_id)
        if lease is None or lease.attempt > attempt:
            return None
        del self._leases[request_id]
        lease.to(LeaseState.ENDED)
        return lease

    def renew(self, request_id: str, now: float) -> bool:
        """False when no such lease lives."""
        lease = self._leases.get(request_id)
        if lease is not None:
            lease.expires_at = now + self._ttl_s
        return lease is not None

    def expired(self, now: float) -> list[Lease]:
        """Leases that nobody renewed in time; the caller ends them."""
        return [lease for lease in self._leases.values() if lease.expires_at <= now]

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        for request_id, lease in self._leases.items():
            assert lease.request_id == request_id and lease.state is not LeaseState.ENDED
            lease.validate()
        bound = [target for lease in self._leases.values() for target in lease.bound.values()]
        assert len(set(bound)) == len(bound), "two leases bound one physical block"

    def _current(self, request_id: str, attempt: int, lease_id: int) -> Lease:
        lease = self._leases.get(request_id)
        if lease is None or (lease.attempt, lease.lease_id) != (attempt, lease_id):
            raise StaleMessage(f"no lease {lease_id} for attempt {attempt} of request {request_id}")
        return lease

    def _complete_if_whole(self, lease: Lease) -> None:
        if lease.state is not LeaseState.COMMITTED or lease.in_flight:
            return
        assert lease.commit is not None
        if len(lease.announced) == lease.commit.num_announcements and lease.is_whole():
            lease.to(LeaseState.COMPLETE)


def announced_blocks(message: Announce) -> list[LogicalBlock]:
    """The logical blocks of an announcement, in order."""
    first, number = message.first_block, len(message.source_blocks)
    return [(message.group, block) for block in range(first, first + number)]

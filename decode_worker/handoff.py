"""What decode knows of one request while its KV comes from prefill, and where its time goes. Pure."""

from dataclasses import dataclass, field

from core.kv_groups import LogicalBlock
from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import Announce, Open, Phases, Ticket
from core.messages.to_rank import TimelineEvent
from decode_worker.coming import Key
from decode_worker.scheduler import DecodeJob
from engine.sequence import ActiveSequence
from kv_transfer.lease_book import Lease

Awaited = tuple[Key, ...]  # consecutive blocks of one KV group


@dataclass
class HandoffTimes:
    """Moments of a handoff on the caller's clock; 0 while they have not come."""

    opened_at: float
    first_announced_at: float = 0.0
    committed_at: float = 0.0
    completed_at: float = 0.0
    first_token_at: float = 0.0


@dataclass
class SharedPrefix:
    """What one handoff's prompt has in common with others that are open; only SharedPrefixes changes it."""

    expected: dict[LogicalBlock, Key] = field(default_factory=dict)  # those that others may take when they come
    awaited: tuple[Awaited, ...] = ()  # brought by another request's transfer, by KV group
    taken: dict[Key, int] = field(default_factory=dict)  # of these, where those lie that have come
    is_orphan: bool = False  # the other transfer ended before all of them came, and nobody was asked for the rest yet

    @property
    def num_awaited(self) -> int:
        """Blocks of all groups."""
        return sum(len(group) for group in self.awaited)

    @property
    def owed(self) -> tuple[Key, ...]:
        """Awaited blocks that have not come, in order."""
        return tuple(key for keys in self.awaited for key in keys if key not in self.taken)

    def blocks_of(self, group: int) -> list[int]:
        """Physical blocks of those awaited that have come, in logical order."""
        keys = self.awaited[group] if self.awaited else ()
        return [self.taken[key] for key in keys if key in self.taken]


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
    shared: SharedPrefix = field(default_factory=SharedPrefix)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.message.request_id

    @property
    def attempt(self) -> int:
        """The attempt's number."""
        return self.message.attempt

    @property
    def key(self) -> tuple[str, int]:
        """(request id, attempt)."""
        return self.message.request_id, self.message.attempt

    def owed_blocks(self) -> list[tuple[int, range]]:
        """KV group and logical blocks, from the first to the last that is owed."""
        found, owed = [], set(self.shared.owed)
        for group, (keys, missing) in enumerate(zip(self.shared.awaited, self.lease.missing, strict=True)):
            numbers = [block for block, key in enumerate(keys, missing.start - len(keys)) if key in owed]
            if numbers:
                found.append((group, range(numbers[0], numbers[-1] + 1)))
        return found

    def ticket(self, decode: ReplicaInfo) -> Ticket:
        """For whoever prefills."""
        missing = self.lease.missing
        firsts = tuple(blocks.start for blocks in missing)
        return Ticket(*self.key, self.lease.lease_id, decode, firsts[0], missing[0].stop, firsts)

    def arrived_blocks(self, group: int) -> list[int]:
        """Physical blocks of a KV group that came, or come, by transfer, in logical order."""
        bound = sorted((block, physical) for (number, block), physical in self.lease.bound.items() if number == group)
        return self.shared.blocks_of(group) + [physical for _, physical in bound]

    def timeline_event(self) -> TimelineEvent:
        """From Open to the moment that decode may go on; only of a handoff that has a source."""
        assert self.source is not None
        times = self.times
        return TimelineEvent(
            self.request_id,
            self.attempt,
            "handoff",
            self.source.address,
            times.opened_at,
            times.completed_at,
            self.transfer_bytes,
        )

    def phases(self) -> Phases:
        """Where the time went from Open to the first token that decode computed."""
        times, lease = self.times, self.lease
        if self.source is None:
            return Phases(prefill_s=times.first_token_at - times.opened_at, num_blocks_reused=self.num_reused_blocks)
        return Phases(
            transfer_s=times.completed_at - (times.first_announced_at or times.completed_at),
            fetching_s=self.fetching_s,
            exposed_transfer_s=max(0.0, times.completed_at - times.committed_at),
            first_decode_s=times.first_token_at - times.completed_at,
            transfer_bytes=self.transfer_bytes,
            num_blocks_received=lease.num_missing,
            num_blocks_reused=self.num_reused_blocks,
        )


@dataclass(frozen=True)
class Fetch:
    """Instruction: bring the bytes of one announcement into these physical blocks."""

    handoff: Handoff
    announce: Announce
    destination_blocks: tuple[int, ...]
    due_s: float  # until the request's client should have its first tokens

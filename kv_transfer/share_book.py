"""Prefill's side of a handoff: which blocks an attempt has announced and decode may still read. Pure.

    SHARING --commit--> COMMITTED --release--> ENDED
       +-- release, expiry, abandon --------------^

Blocks gain one reader per announced attempt and lose it when the share ends: on Release, or when it expires, which is
later than any deadline that decode has for its fetches.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from core.kv_groups import LogicalBlock
from core.messages.to_rank import SlabHeader
from kv_transfer.tombstones import Tombstones


class ShareState(StrEnum):
    """See the picture above."""

    SHARING = "sharing"
    COMMITTED = "committed"
    ENDED = "ended"


_LEGAL = {
    ShareState.SHARING: {ShareState.COMMITTED, ShareState.ENDED},
    ShareState.COMMITTED: {ShareState.ENDED},
    ShareState.ENDED: set(),
}


@dataclass
class Shared:
    """One logical block that decode may read: where it lies, and the places of layers that are final."""

    physical: int
    layers: int = 0  # a bit for each place


@dataclass
class Share:
    """The blocks of one attempt that decode may read, in order of announcement."""

    request_id: str
    attempt: int
    lease_id: int
    expires_at: float
    state: ShareState = ShareState.SHARING
    readable: dict[LogicalBlock, Shared] = field(default_factory=dict)
    num_announcements: int = 0

    def to(self, state: ShareState) -> None:
        """The one door to another state."""
        assert state in _LEGAL[self.state], f"share of {self.request_id}: {self.state} -> {state}"
        self.state = state


class ShareBook:
    """All live shares of a prefill replica."""

    def __init__(self, block_size: int, ttl_s: float) -> None:
        self._block_size = block_size
        self._ttl_s = ttl_s
        self._shares: dict[tuple[str, int], Share] = {}
        self._tombstones = Tombstones()

    def __len__(self) -> int:
        return len(self._shares)

    def open(self, request_id: str, attempt: int, lease_id: int, now: float) -> Share:
        """Raises StaleMessage when the attempt was cancelled or released before it began."""
        self._tombstones.refuse(request_id, attempt)
        assert (request_id, attempt) not in self._shares
        share = self._shares[(request_id, attempt)] = Share(request_id, attempt, lease_id, now + self._ttl_s)
        return share

    def refuse_stale(self, request_id: str, attempt: int) -> None:
        """Raises StaleMessage when the attempt is over."""
        self._tombstones.refuse(request_id, attempt)

    def bury(self, request_id: str, attempt: int, now: float) -> None:
        """A cancel came; a Prefill of this or a lower attempt that comes later is refused."""
        self._tombstones.bury(request_id, attempt, now)

    def announce(
        self, share: Share, group: int, first_block: int, physical: list[int], layers: range, now: float
    ) -> tuple[int, list[int]]:
        """Layers of logical blocks become readable; returns the announcement's number and what gains a reader.

        `physical` and the latter are physical blocks, those where the group's logical ones from `first_block` on lie.
        """
        assert share.state is ShareState.SHARING
        number = share.num_announcements
        share.num_announcements += 1
        share.expires_at = now + self._ttl_s
        fresh, final = [], _bits(layers)
        for logical, block in enumerate(physical, first_block):
            shared = share.readable.get((group, logical))
            if shared is None:
                shared = share.readable[group, logical] = Shared(block)
                fresh.append(block)
            assert shared.physical == block, "a shared block does not move"
            shared.layers |= final
        return number, fresh

    def commit(self, share: Share, now: float) -> None:
        """No more announcements will come."""
        share.to(ShareState.COMMITTED)
        share.expires_at = now + self._ttl_s

    def end(self, request_id: str, attempt: int, now: float) -> list[int]:
        """The attempt's blocks lose their reader: returns them (none when it had already ended)."""
        self._tombstones.bury(request_id, attempt, now)
        share = self._shares.pop((request_id, attempt), None)
        if share is None:
            return []
        share.to(ShareState.ENDED)
        return [shared.physical for shared in share.readable.values()]

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a slab is what its lease was promised.

        That is: these layers of these logical blocks of this KV group were announced under this very attempt, they are
        not yet released, and they lie where the slab says.
        """
        share = self._shares.get((header.request_id, header.attempt))
        if share is None or share.lease_id != header.lease_id:
            return False
        span = header.source
        layers = _bits(range(span.first_layer, span.first_layer + span.num_layers))
        blocks = span.physical_blocks(self._block_size)
        found = [share.readable.get((header.group, logical)) for logical in header.logical_blocks]
        return len(found) == len(blocks) and all(
            shared is not None and shared.physical == block and shared.layers & layers == layers
            for shared, block in zip(found, blocks, strict=True)
        )

    def expired(self, now: float) -> list[Share]:
        """Shares that decode never released; the caller ends them."""
        return [share for share in self._shares.values() if share.expires_at <= now]


def _bits(layers: range) -> int:
    return ((1 << len(layers)) - 1) << layers.start

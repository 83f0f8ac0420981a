"""Lets other replicas read prefix blocks that this one has cached, whatever its role. Pure.

Borrow --cached blocks gain a reader--> lent --GiveBack, or expiry--> they lose it
"""

from core.block_hash import in_group
from core.kv_groups import deepest_prefix
from core.messages.fleet import ReplicaInfo
from core.messages.to_lender import Borrow, Lent, LentBlocks
from core.messages.to_rank import SlabHeader
from engine.block_pool import BlockPool, OutOfBlocks
from kv_transfer.share_book import ShareBook

_ATTEMPT = _LEASE = 0  # a loan is read once, under its own name


class Lender:
    """One per replica, on its first rank."""

    def __init__(self, info: ReplicaInfo, pool: BlockPool, ttl_s: float) -> None:
        self._info = info
        self._pool = pool
        self._shares = ShareBook(info.layout.block_size, ttl_s)
        self._lent: dict[str, Lent] = {}

    def __len__(self) -> int:
        return len(self._lent)

    def lend(self, message: Borrow, now: float) -> Lent:
        """Holds the cached ones of the leading blocks in place. Raises StaleMessage when the loan was ended before."""
        known = self._lent.get(message.loan_id)
        if known is not None:
            return known
        self._shares.refuse_stale(message.loan_id, _ATTEMPT)
        groups = self._cached(message)
        blocks = [block for group in groups for block in group.source_blocks]
        try:
            self._pool.own(blocks)
        except OutOfBlocks:  # leases have first claim on them
            groups, blocks = [], []
        lent = Lent(self._info, groups[0].source_blocks if groups else (), tuple(groups))
        if blocks:
            self._share(message.loan_id, groups, now)
            self._pool.disown(blocks)
            self._lent[message.loan_id] = lent
        return lent

    def give_back(self, loan_id: str, now: float) -> None:
        """Ends a loan, also one still to come; idempotent."""
        self._pool.end_read(self._shares.end(loan_id, _ATTEMPT, now))
        self._lent.pop(loan_id, None)

    def give_back_expired(self, now: float) -> list[str]:
        """Ends loans that nobody gave back; returns their names."""
        expired = [share.request_id for share in self._shares.expired(now)]
        for loan_id in expired:
            self.give_back(loan_id, now)
        return expired

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a slab is part of a loan."""
        return self._shares.may_read(header)

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        assert len(self._shares) == len(self._lent)

    def _cached(self, message: Borrow) -> list[LentBlocks]:
        """What is cached of the blocks asked for, or of the deepest prefix that one can go on behind, by KV group."""
        layout, hashes = self._info.layout, message.block_hashes
        if message.group is not None:
            keys = [in_group(block_hash, message.group) for block_hash in hashes]
            blocks = tuple(self._pool.match(keys))
            return [LentBlocks(message.group, message.first_block, blocks)] if blocks else []
        depth = deepest_prefix(layout.reaches, hashes, self._pool.__contains__)
        end, found = message.first_block + depth, []
        for number, group in enumerate(layout.kv_groups):
            first = max(message.first_block, group.first_needed(end * layout.block_size, layout.block_size))
            keys = [in_group(block_hash, number) for block_hash in hashes[first - message.first_block : depth]]
            found.append(LentBlocks(number, first, tuple(self._pool.match(keys))))
        return [lent for lent in found if lent.source_blocks]

    def _share(self, loan_id: str, groups: list[LentBlocks], now: float) -> None:
        share = self._shares.open(loan_id, _ATTEMPT, _LEASE, now)
        for lent in groups:
            places = range(len(self._info.layout.kv_groups[lent.group].layers))
            _, fresh = self._shares.announce(share, lent.group, lent.first_block, [*lent.source_blocks], places, now)
            self._pool.begin_read(fresh)

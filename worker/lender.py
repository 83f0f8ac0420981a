"""Lets other replicas read prefix blocks that this one has cached, whatever its role. Pure.

Borrow --cached blocks gain a reader--> lent --GiveBack, or expiry--> they lose it
"""

from core.messages.fleet import ReplicaInfo
from core.messages.to_lender import Borrow, Lent
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
        try:
            blocks = self._pool.acquire_cached(message.block_hashes)
        except OutOfBlocks:  # leases have first claim on them
            blocks = []
        lent = Lent(self._info, tuple(blocks))
        if blocks:
            share = self._shares.open(message.loan_id, _ATTEMPT, _LEASE, now)
            layers = range(self._info.layout.num_layers)
            _, fresh = self._shares.announce(share, message.first_block, blocks, layers, now)
            self._pool.begin_read(fresh)
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

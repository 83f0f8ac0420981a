"""Prefixes that another replica has cached, on their way into this one's cache: the twin of worker/borrower.py. Pure.

Borrow --Lent--> transfers of all KV groups --all there--> findable here --> GiveBack, and whoever waited goes on
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from core.block_hash import BlockHash, BlockKey, in_group
from core.errors import BatonError, PeerLost
from core.kv_groups import chain_key, deepest_prefix
from core.messages import to_decode
from core.messages.to_lender import Borrow, Lent, LentBlocks
from core.messages.to_rank import Fetched
from engine.block_pool import OutOfBlocks
from simulator.host import Host
from worker.arriving import ChainKey, arriving

Then = Callable[[Fetched | None], None]


class _Loan:
    """One that is under way: the transfers that it still waits for."""

    def __init__(self, stack: ExitStack, num_transfers: int, begun_at: float) -> None:
        self.stack = stack
        self.num_transfers = num_transfers
        self.begun_at = begun_at
        self.num_bytes = 0
        self.is_whole = True


class Borrowing:
    """One per replica. A prefix that several requests want at a time is fetched once."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._coming: dict[BlockKey, list[Then]] = {}  # by the first block that is missing: who waits for it

    def __len__(self) -> int:
        return len(self._coming)

    def borrow(self, name: str, hashes: Sequence[BlockHash], source: Host, then: Then) -> None:
        """Calls `then` when the prefix is cached here, or will not come; with the transfer, if this call made it."""
        layout = self._host.info.layout
        num_here = deepest_prefix(layout.reaches, hashes, self._host.pool.__contains__)
        if num_here == len(hashes):
            then(None)
            return
        borrow = Borrow(self._loan_id(name), tuple(hashes[num_here:]), num_here)
        self._fetch(hashes[num_here], borrow, hashes, source, then)

    def borrow_blocks(
        self, name: str, sequence: to_decode.Sequence, group: int, blocks: range, source: Host, then: Then
    ) -> None:
        """As `borrow`, but for these logical blocks of one KV group."""
        hashes = sequence.block_hashes
        keys = [in_group(block_hash, group) for block_hash in hashes[blocks.start : blocks.stop]]
        num_here = len(self._host.pool.match(keys))
        if num_here == len(keys):
            then(None)
            return
        first = blocks.start + num_here
        borrow = Borrow(self._loan_id(f"{name}.{group}"), hashes[first : blocks.stop], first, group)
        self._fetch(keys[num_here], borrow, hashes, source, then)

    def _loan_id(self, name: str) -> str:
        return f"{name}~{self._host.info.replica_id}"

    def _fetch(self, key: BlockKey, borrow: Borrow, hashes: Sequence[bytes], source: Host, then: Then) -> None:
        if key in self._coming:
            self._coming[key].append(then)
            return
        self._coming[key] = [then]
        over = partial(self._over, key, borrow.loan_id, source)

        def failed(error: BatonError) -> None:
            del error
            over(None)

        def ask() -> None:
            wire.tell(source.number, self._host, self._bring, hashes, source, source.lend(borrow), over)

        wire = self._host.world.wire
        wire.tell(self._host.number, source, ask, failed=failed)

    def _bring(self, hashes: Sequence[bytes], source: Host, lent: Lent, over: Then) -> None:
        if not lent.groups:
            over(None)
            return
        layout, pool = self._host.info.layout, self._host.pool
        before, coming = list[BlockKey](), list[ChainKey]()
        for of_group in lent.groups:
            group, first = layout.kv_groups[of_group.group], of_group.first_block
            needed = range(group.first_needed(first * layout.block_size, layout.block_size), first)
            before += [in_group(hashes[block], of_group.group) for block in needed]
            logical = range(first, first + len(of_group.source_blocks))
            coming += [chain_key(hashes, of_group.group, group, block) for block in logical]
        stack = ExitStack()
        try:
            with self._host.touching_blocks():
                stack.enter_context(arriving(pool, before, coming))
        except OutOfBlocks:
            over(None)
            return
        loan = _Loan(stack, len(lent.groups), self._host.world.queue.now)
        for of_group in lent.groups:
            self._transfer(loan, of_group, source, over)

    def _transfer(self, loan: _Loan, lent: LentBlocks, source: Host, over: Then) -> None:
        layers = len(self._host.info.layout.kv_groups[lent.group].layers)
        num_bytes = len(lent.source_blocks) * source.block_bytes(layers)

        def done(came: bool) -> None:
            loan.num_transfers -= 1
            loan.num_bytes += num_bytes
            loan.is_whole &= came
            if loan.num_transfers or not self._host.alive:
                return
            if loan.is_whole:
                with self._host.touching_blocks():
                    loan.stack.close()
                over(Fetched(loan.num_bytes, self._host.world.queue.now - loan.begun_at))
            else:
                lost = PeerLost(f"{source.info.replica_id} is gone")
                with self._host.touching_blocks(), suppress(PeerLost):
                    loan.stack.__exit__(PeerLost, lost, None)
                over(None)

        self._host.world.network.send(source.number, self._host.number, num_bytes, done)

    def _over(self, key: BlockKey, loan_id: str, source: Host, fetched: Fetched | None) -> None:
        self._host.world.wire.tell(self._host.number, source, source.give_back, loan_id)
        first, *others = self._coming.pop(key)
        first(fetched)
        for then in others:
            then(None)

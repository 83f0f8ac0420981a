"""The replicas that KV comes from: decode fetches, borrows and releases their blocks, and measures each link."""

import asyncio
import logging

from core.errors import BatonError, TransferFailed
from core.messages.fleet import ReplicaInfo
from core.messages.to_prefill import Release
from core.messages.to_rank import Fetched
from decode_worker.handoff import Fetch, Handoff
from decode_worker.links import Links
from rpc import methods
from worker.borrower import Borrower, Hashes
from worker.fetcher import BlockOrder, Fetcher
from worker.patience import wait_for_at_most
from worker.rank_context import RankContext
from worker.samples import Samples

logger = logging.getLogger(__name__)


class Sources:
    """Calls to other replicas alone: what they change in decode's books is the caller's."""

    def __init__(self, context: RankContext, fetcher: Fetcher, samples: Samples) -> None:
        self._client = context.client
        self._timeout_s = context.spec.transfer.control_timeout_s
        self._fetcher = fetcher
        self._borrower = Borrower(context, fetcher)
        self.links = Links()
        self._under_way: set[asyncio.Task[None]] = set()
        self._samples = samples

    @property
    def num_loans(self) -> int:
        """Loans under way, giving them back included."""
        return len(self._borrower)

    async def prepare(self, source: ReplicaInfo) -> None:
        """Channels are made while prefill computes; those that stand already cost nothing."""
        try:
            await self._fetcher.prepare(source)
        except BatonError as error:
            logger.info("channels from %s are not ready yet: %s", source.replica_id, error)

    async def fetch(self, fetch: Fetch) -> Fetched:
        """Brings announced blocks. Raises a BatonError only when no rank writes any more."""
        source_id = fetch.announce.source.replica_id
        try:
            fetched = await self._fetcher.fetch(_order(fetch))
        except TransferFailed as error:
            if error.field == "digest":
                self.links.corrupt(source_id)
            raise
        self._measured(source_id, fetched)
        return fetched

    async def borrow(
        self, name: str, hashes: Hashes, source: ReplicaInfo, due_s: float, patience_s: float = 0.0
    ) -> None:
        """Returns when the prefix is cached here, or will not come, or after `patience_s` unless that is 0.

        `name` is unique in the fleet.
        """

        async def bring() -> None:
            self._add(source, await self._borrower.borrow(name, hashes, source, due_s))

        await wait_for_at_most(patience_s, bring(), self._under_way)

    async def borrow_owed(self, handoff: Handoff) -> None:
        """As `borrow`: what was to come with another request's transfer, which ended before."""
        source, message = handoff.source, handoff.message
        assert source is not None
        name = f"{handoff.request_id}.{handoff.attempt}.owed"
        for group, blocks in handoff.owed_blocks():
            borrowed = self._borrower.borrow_blocks(
                name, message.sequence.block_hashes, group, blocks, source, message.due_s
            )
            self._add(source, await borrowed)

    async def release(self, handoff: Handoff) -> None:
        """Prefill may free the attempt's blocks; one that does not hear it lets them expire."""
        assert handoff.source is not None
        message = Release(*handoff.key)
        try:
            await self._client.call(handoff.source.address, methods.RELEASE, message, self._timeout_s)
        except BatonError as error:
            logger.info("prefill %s did not take a release: %s", handoff.source.replica_id, error)

    def _add(self, source: ReplicaInfo, fetched: Fetched | None) -> None:
        if fetched is not None:
            self._measured(source.replica_id, fetched)

    def _measured(self, source_id: str, fetched: Fetched) -> None:
        self.links.add(source_id, fetched)
        self._samples.add_transfer(source_id, fetched.num_bytes, fetched.seconds)


def _order(fetch: Fetch) -> BlockOrder:
    announce = fetch.announce
    return BlockOrder(
        announce.request_id,
        announce.attempt,
        announce.lease_id,
        announce.source,
        announce.first_layer,
        announce.num_layers,
        announce.first_block,
        announce.source_blocks,
        fetch.destination_blocks,
        fetch.due_s,
        announce.group,
    )

"""The transfer agent of one rank: fetches KV blocks into its pool, and sends blocks of it to ranks that ask.

Whatever the outcome of a fetch, when it returns or raises no byte of its destination will be written any more.
"""

import asyncio
import random
import time
from collections.abc import Sequence

from torch import Tensor

from core.config import TransferConfig
from core.errors import StaleMessage, TransferFailed
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged
from core.messages.to_rank import (
    BlockDigests,
    CloseChannel,
    Connect,
    Connected,
    Copy,
    DigestBlocks,
    FetchBlocks,
    Fetched,
    Granted,
    Ready,
    SlabHeader,
    TimelineEvent,
)
from kv_transfer.channels.protocol import Connector
from kv_transfer.digest import digest
from kv_transfer.flow_control import Slab
from kv_transfer.inbound import Inbound
from kv_transfer.link import Identity, Linker, within
from kv_transfer.outbound import MayRead, Outbound
from kv_transfer.pairs import Pairs
from kv_transfer.peer_control import PeerControl
from kv_transfer.plan import require_exchangeable, split_into_slabs
from kv_transfer.spans import copy_span, require_inside, require_same_shape, span_bytes
from kv_transfer.timeline import Timeline
from kv_transfer.transfer import Transfer, finish

SlabsBySource = dict[str, list[Slab]]  # by the address that they come from


class TransferAgent:
    """Belongs to one event loop; blocking work runs in threads."""

    def __init__(
        self,
        *,
        address: str,
        incarnation: int,
        pool: Tensor,
        layout: KVLayout,
        compatibility: Compatibility,
        config: TransferConfig,
        connectors: Sequence[Connector],
        control: PeerControl,
        may_read: MayRead,
    ) -> None:
        """`address` is the rank's RPC address and its name to peers.

        `pool` is [places, blocks, planes, heads, size, dim]. The agent owns `connectors`, in order of preference, and
        closes them.
        """
        assert pool.is_contiguous()
        assert (pool.shape[0], *pool.shape[2:4]) == (layout.places_per_rank, layout.num_planes, layout.heads_per_rank)
        assert tuple(pool.shape[4:]) == (layout.block_size, layout.head_dim)
        self.timeline = Timeline()
        self._identity = Identity(address, incarnation, compatibility, layout)
        self._pool = pool
        self._config = config
        self._connectors = connectors
        self._control = control
        pairs = Pairs(int(config.pairs_mib * 2**20), config.pair_idle_timeout_s, config.control_timeout_s)
        linker = Linker(self._identity, config, control, connectors, pairs)
        self.inbound = Inbound(self._identity, config, control, linker, self.timeline)
        self.outbound = Outbound(self._identity, config, connectors, pairs, pool, may_read, self.timeline)
        self._sampling = random.Random()
        self._running: set[asyncio.Task[object]] = set()
        self._is_closed = False

    # ---- receiving ----------------------------------------------------------------------------------------------

    async def fetch(self, order: FetchBlocks) -> Fetched:
        """Carries out a planned order: from all its source ranks at a time, slab by slab.

        Raises TransferFailed (also at `timeout_s`; field "digest" when what came is not what was sent), PeerLost or
        Incompatible. Safe to cancel: slabs that were granted complete and are discarded, and the channels go on serving
        others.
        """
        started = time.monotonic()
        if self._is_closed:
            raise TransferFailed("the transfer agent is closed")
        require_exchangeable(self._identity.layout, order.source_layout)
        transfer = Transfer(order.request_id, order.attempt, order.lease_id, started + order.due_s, order.group)
        slabs = self._slabs_by_source(order)
        parts = [asyncio.create_task(self._fetch_from(address, transfer, slabs[address])) for address in slabs]
        self._running.update(parts)
        num_digests = 0
        try:
            async with asyncio.timeout(order.timeout_s):
                sizes = await asyncio.gather(*parts)
                if self._sampling.random() < self._config.digest_share:
                    num_digests = await self._compare_digests(transfer, slabs)
        except TimeoutError as error:
            raise TransferFailed(f"{order.request_id}: not all blocks came within {order.timeout_s} s") from error
        finally:
            await transfer.come_to_rest()
            for part in parts:
                part.cancel()
            await finish(asyncio.gather(*parts, return_exceptions=True))
            self._running.difference_update(parts)
        return Fetched(sum(sizes), time.monotonic() - started, num_digests)

    def prepare(self, addresses: Sequence[str]) -> None:
        """Connects to peers ahead of the first fetch from them."""
        for address in addresses:
            if address != self._identity.address:
                self.inbound.prepare(address)

    async def close(self) -> None:
        """Fails running fetches and ends all channels; no thread or file descriptor stays."""
        self._is_closed = True
        await self.inbound.close()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.outbound.close()
        for connector in self._connectors:
            await asyncio.to_thread(connector.close)

    # ---- sending ------------------------------------------------------------------------------------------------

    async def on_connect(self, message: Connect) -> Connected:
        """See Outbound.on_connect."""
        return await self.outbound.on_connect(message)

    async def on_ready(self, message: Ready) -> Granted:
        """See Outbound.on_ready."""
        return await self.outbound.on_ready(message)

    async def on_close(self, message: CloseChannel) -> Acknowledged:
        """See Outbound.on_close."""
        return await self.outbound.on_close(message)

    async def on_digest(self, message: DigestBlocks) -> BlockDigests:
        """What slabs hold here. Raises StaleMessage for those that may not be read."""
        for header in message.slabs:
            if not self.outbound.is_readable(header):
                raise StaleMessage(f"request {header.request_id} may not be read", field="request_id")
        spans = [header.source for header in message.slabs]
        return BlockDigests(await asyncio.to_thread(lambda: tuple(digest(self._pool, span) for span in spans)))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _slabs_by_source(self, order: FetchBlocks) -> SlabsBySource:
        slab_bytes = int(self._config.slab_mib * 2**20)
        logical = {block: order.first_block + i for i, block in enumerate(order.source_blocks)}
        slabs: SlabsBySource = {}
        for copy in order.copies:
            require_inside(self._pool, copy.destination)
            require_same_shape(copy)
            for part in split_into_slabs(copy, self._identity.layout, slab_bytes):
                address = order.source_addresses[part.source_rank]
                slab = Slab(
                    part,
                    _logical_blocks(part, logical, order.source_layout.block_size),
                    span_bytes(self._pool, part.destination),
                )
                slabs.setdefault(address, []).append(slab)
        return slabs

    async def _fetch_from(self, address: str, transfer: Transfer, slabs: Sequence[Slab]) -> int:
        if address == self._identity.address:
            return await self._copy_locally(transfer, slabs)
        return await self.inbound.fetch(address, transfer, slabs)

    async def _copy_locally(self, transfer: Transfer, slabs: Sequence[Slab]) -> int:
        for slab in slabs:
            require_inside(self._pool, slab.copy.source)
        return sum([await asyncio.to_thread(self._copy, transfer, slab.copy) for slab in slabs])

    def _copy(self, transfer: Transfer, slab: Copy) -> int:
        if not transfer.landing.begin_write():
            return 0
        try:
            return copy_span(self._pool, slab.source, self._pool, slab.destination)
        finally:
            transfer.landing.end_write()

    async def _compare_digests(self, transfer: Transfer, slabs: SlabsBySource) -> int:
        """Number of slabs compared. Raises TransferFailed, field "digest"."""
        if self._config.wire_dtype:
            return 0  # what comes is not what is stored
        begun_at, num_bytes = time.monotonic(), 0
        for address, of_peer in slabs.items():
            if address == self._identity.address:
                continue
            headers = tuple(
                SlabHeader(
                    0,
                    transfer.request_id,
                    transfer.attempt,
                    slab.copy.source,
                    transfer.lease_id,
                    slab.logical_blocks,
                    transfer.group,
                )
                for slab in of_peer
            )
            asked = within(
                self._config.control_timeout_s, address, self._control.digest(address, DigestBlocks(headers))
            )
            theirs, ours = await asyncio.gather(asked, asyncio.to_thread(self._digests, of_peer))
            if theirs.digests != ours:
                raise TransferFailed(
                    f"{transfer.request_id}: blocks from {address} are not what was sent", field="digest"
                )
            num_bytes += sum(slab.num_bytes for slab in of_peer)
        event = TimelineEvent(
            transfer.request_id, transfer.attempt, "digest", "", begun_at, time.monotonic(), num_bytes
        )
        self.timeline.add(event)
        return sum(map(len, slabs.values()))

    def _digests(self, slabs: Sequence[Slab]) -> tuple[int, ...]:
        return tuple(digest(self._pool, slab.copy.destination) for slab in slabs)


def _logical_blocks(copy: Copy, logical: dict[int, int], block_size: int) -> tuple[int, ...]:
    """Empty when the order does not say which blocks of the request its source blocks are."""
    return tuple(logical[block] for block in copy.source.physical_blocks(block_size)) if logical else ()

"""The transfer agent of one rank: fetches KV blocks into its pool, and sends blocks of it to ranks that ask.

Whatever the outcome of a fetch, when it returns or raises no byte of its destination will be written any more.
"""

import asyncio
import time
from collections.abc import Sequence

from torch import Tensor

from core.config import TransferConfig
from core.errors import TransferFailed
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged
from core.messages.to_rank import CloseChannel, Connect, Connected, Copy, FetchBlocks, Fetched, Ready
from kv_transfer.channels.protocol import Connector
from kv_transfer.inbound import Identity, Inbound
from kv_transfer.outbound import MayRead, Outbound
from kv_transfer.peer_control import PeerControl
from kv_transfer.plan import require_exchangeable, split_into_slabs
from kv_transfer.spans import copy_span, require_inside, require_same_shape
from kv_transfer.transfer import Transfer, finish


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
        connector: Connector,
        control: PeerControl,
        may_read: MayRead,
    ) -> None:
        """`address` is the rank's RPC address and its name to peers.

        `pool` is [layers, blocks, planes, heads, size, dim]. The agent owns `connector` and closes it.
        """
        assert pool.is_contiguous()
        assert (pool.shape[0], *pool.shape[2:4]) == (layout.num_layers, layout.num_planes, layout.heads_per_rank)
        assert tuple(pool.shape[4:]) == (layout.block_size, layout.head_dim)
        self._identity = Identity(address, incarnation, compatibility, layout)
        self._pool = pool
        self._config = config
        self._connector = connector
        self._control = control
        self._inbound: dict[str, Inbound] = {}
        self._in_flight = asyncio.Semaphore(config.max_slabs_in_flight)
        self._outbound = Outbound(self._identity, config, connector, pool, may_read)
        self._running: set[asyncio.Task[object]] = set()
        self._is_closed = False

    # ---- receiving ----------------------------------------------------------------------------------------------

    async def fetch(self, order: FetchBlocks) -> Fetched:
        """Carries out a planned order: from all its source ranks at a time, slab by slab.

        Raises TransferFailed (also at `timeout_s`), PeerLost or Incompatible. Safe to cancel: slabs that were granted
        complete and are discarded, and the channels go on serving others.
        """
        started = time.monotonic()
        if self._is_closed:
            raise TransferFailed("the transfer agent is closed")
        require_exchangeable(self._identity.layout, order.source_layout)
        transfer = Transfer(order.request_id, order.attempt)
        parts = [
            asyncio.create_task(self._fetch_from(address, transfer, slabs))
            for address, slabs in self._slabs_by_source(order).items()
        ]
        self._running.update(parts)
        try:
            async with asyncio.timeout(order.timeout_s):
                sizes = await asyncio.gather(*parts)
        except TimeoutError as error:
            raise TransferFailed(f"{order.request_id}: not all blocks came within {order.timeout_s} s") from error
        finally:
            await transfer.come_to_rest()
            for part in parts:
                part.cancel()
            await finish(asyncio.gather(*parts, return_exceptions=True))
            self._running.difference_update(parts)
        return Fetched(sum(sizes), time.monotonic() - started)

    async def close(self) -> None:
        """Fails running fetches and ends all channels; no thread or file descriptor stays."""
        self._is_closed = True
        await asyncio.gather(*(inbound.close("closing") for inbound in self._inbound.values()))
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._outbound.close()
        await asyncio.to_thread(self._connector.close)

    # ---- sending ------------------------------------------------------------------------------------------------

    async def on_connect(self, message: Connect) -> Connected:
        """See Outbound.on_connect."""
        return await self._outbound.on_connect(message)

    async def on_ready(self, message: Ready) -> Acknowledged:
        """See Outbound.on_ready."""
        return await self._outbound.on_ready(message)

    async def on_close(self, message: CloseChannel) -> Acknowledged:
        """See Outbound.on_close."""
        return await self._outbound.on_close(message)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _slabs_by_source(self, order: FetchBlocks) -> dict[str, list[Copy]]:
        """Slabs of an order by the address that they come from."""
        slab_bytes = int(self._config.slab_mib * 2**20)
        slabs: dict[str, list[Copy]] = {}
        for copy in order.copies:
            require_inside(self._pool, copy.destination)
            require_same_shape(copy)
            address = order.source_addresses[copy.source_rank]
            slabs.setdefault(address, []).extend(split_into_slabs(copy, self._identity.layout, slab_bytes))
        return slabs

    async def _fetch_from(self, address: str, transfer: Transfer, slabs: Sequence[Copy]) -> int:
        if address == self._identity.address:
            return await self._copy_locally(transfer, slabs)
        inbound = self._inbound.get(address)
        if inbound is None:
            inbound = Inbound(address, self._identity, self._config, self._control, self._connector, self._in_flight)
            self._inbound[address] = inbound
        return await inbound.fetch(transfer, slabs)

    async def _copy_locally(self, transfer: Transfer, slabs: Sequence[Copy]) -> int:
        for slab in slabs:
            require_inside(self._pool, slab.source)
        return sum([await asyncio.to_thread(self._copy, transfer, slab) for slab in slabs])

    def _copy(self, transfer: Transfer, slab: Copy) -> int:
        if not transfer.landing.begin_write():
            return 0
        try:
            return copy_span(self._pool, slab.source, self._pool, slab.destination)
        finally:
            transfer.landing.end_write()

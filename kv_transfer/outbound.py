"""What one rank sends, to all its peers: obeys their grants, in their order."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from core.config import TransferConfig
from core.errors import StaleMessage, TransferFailed
from core.messages.fleet import Acknowledged
from core.messages.to_rank import CloseChannel, Connect, Connected, Ready, SlabHeader
from kv_transfer.channels.protocol import ChannelId, Connector, SenderEnd, Terms
from kv_transfer.inbound import Identity
from kv_transfer.plan import require_exchangeable
from kv_transfer.spans import require_inside

MayRead = Callable[[SlabHeader], bool]


@dataclass(eq=False)
class _Link:
    """One generation of a channel, as its sender sees it."""

    channel: ChannelId
    end: SenderEnd
    next_sequence: int = 0


class Outbound:
    """The sending ends of one rank's channels. Belongs to one event loop."""

    def __init__(
        self, identity: Identity, config: TransferConfig, connector: Connector, pool: Tensor, may_read: MayRead
    ) -> None:
        """`may_read` says whether a slab's source still holds what its request wants."""
        self._identity = identity
        self._config = config
        self._connector = connector
        self._pool = pool
        self._may_read = may_read
        self._links: dict[str, _Link] = {}
        self._is_closed = False

    async def on_connect(self, message: Connect) -> Connected:
        """Builds this end of a new generation, which replaces the older. Repeatable.

        Raises Incompatible naming the field, StaleMessage for an older generation of the same incarnation.
        """
        self._identity.compatibility.require_equal(message.compatibility)
        require_exchangeable(self._identity.layout, message.layout)
        if self._is_closed:
            raise StaleMessage("this rank is closing", field="generation")
        channel = ChannelId(self._identity.address, message.receiver, message.receiver_incarnation, message.generation)
        answer = Connected(self._identity.incarnation, self._connector.rendezvous)
        older = self._links.get(message.receiver)
        if older is not None and older.channel.receiver_incarnation == channel.receiver_incarnation:
            if older.channel == channel:
                return answer
            if older.channel.generation > channel.generation:
                raise StaleMessage(f"{older.channel} replaced {channel}", field="generation")
        self._links[message.receiver] = _Link(channel, self._connector.sender_end(Terms(channel, "")))
        if older is not None:
            await asyncio.to_thread(older.end.abort, "replaced by a newer generation")
        return answer

    async def on_ready(self, message: Ready) -> Acknowledged:
        """Queues the granted slabs, all or none. A repeated grant is acknowledged and not sent again.

        Raises StaleMessage: field "generation" when the channel is not this one, "request_id" for refused slabs.
        """
        link = self._link_of(message.receiver, message.receiver_incarnation, message.generation)
        if link is None or not link.end.is_open:
            raise StaleMessage(f"no channel to {message.receiver} of that generation", field="generation")
        first = message.slabs[0].sequence
        if first < link.next_sequence:
            return Acknowledged(known=False)
        if first > link.next_sequence:
            raise StaleMessage(f"slab {first} granted, {link.next_sequence} expected", field="generation")
        for header in message.slabs:
            self._require_readable(header)
        link.next_sequence += len(message.slabs)
        for header in message.slabs:
            link.end.send(header, self._config.data_timeout_s)
        return Acknowledged()

    async def on_close(self, message: CloseChannel) -> Acknowledged:
        """Ends a channel that its receiver has given up; another generation is left alone."""
        link = self._link_of(message.receiver, message.receiver_incarnation, message.generation)
        if link is None:
            return Acknowledged(known=False)
        del self._links[message.receiver]
        await asyncio.to_thread(link.end.abort, "closed by the receiver")
        return Acknowledged()

    async def close(self) -> None:
        """Ends all channels."""
        self._is_closed = True
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(asyncio.to_thread(link.end.abort, "closing") for link in links))

    def _link_of(self, receiver: str, incarnation: int, generation: int) -> _Link | None:
        link = self._links.get(receiver)
        if link is None or (link.channel.receiver_incarnation, link.channel.generation) != (incarnation, generation):
            return None
        return link

    def _require_readable(self, header: SlabHeader) -> None:
        try:
            require_inside(self._pool, header.source)
        except TransferFailed as error:
            raise StaleMessage(str(error), field="request_id") from error
        if not self._may_read(header):
            raise StaleMessage(f"request {header.request_id} may not be read", field="request_id")

"""What one rank sends, to all its peers: obeys their grants, in their order, and only what they may read."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from torch import Tensor

from core.config import TransferConfig
from core.errors import Incompatible, StaleMessage, TransferFailed
from core.kv_budget import channel_bytes
from core.messages.fleet import Acknowledged
from core.messages.to_rank import CloseChannel, Connect, Connected, Granted, Offer, Ready, SlabHeader, TimelineEvent
from kv_transfer.channels.choice import common
from kv_transfer.channels.protocol import ChannelId, Connector, Passage, SenderEnd, Terms
from kv_transfer.link import Identity
from kv_transfer.pairs import Pairs
from kv_transfer.plan import require_exchangeable
from kv_transfer.session import SenderSession
from kv_transfer.spans import require_inside
from kv_transfer.timeline import Timeline
from kv_transfer.transfer import drop_result, when_done

MayRead = Callable[[SlabHeader], bool]


@dataclass(eq=False)
class _Link:
    """The channel to one receiver, as its sender sees it."""

    session: SenderSession
    channel: ChannelId
    answer: "asyncio.Task[Connected] | None" = None  # builds `end`, then tells the receiver where to find it
    end: SenderEnd | None = None
    refused: set[int] = field(default_factory=set)  # sequence numbers


class Outbound:
    """The sending ends of one rank's channels. Belongs to one event loop."""

    def __init__(
        self,
        identity: Identity,
        config: TransferConfig,
        connectors: Sequence[Connector],
        pairs: Pairs,
        pool: Tensor,
        may_read: MayRead,
        timeline: Timeline,
    ) -> None:
        """`may_read` says whether a slab's source still holds what its request wants."""
        self._identity = identity
        self._config = config
        self._connectors = {connector.kind: connector for connector in connectors}
        self._pairs = pairs
        self._pool = pool
        self._may_read = may_read
        self._timeline = timeline
        self._links: dict[str, _Link] = {}
        self._is_closed = False

    @property
    def num_links(self) -> int:
        """Peers that a channel is open to."""
        return len(self._links)

    async def on_connect(self, message: Connect) -> Connected:
        """Builds this end of a new generation, which replaces the older. Repeatable.

        Raises Incompatible naming the field, StaleMessage for an older generation of the same incarnation,
        TransferFailed when there is no memory for another channel.
        """
        self._identity.compatibility.require_equal(message.compatibility)
        require_exchangeable(self._identity.layout, message.layout)
        if message.wire_dtype != self._config.wire_dtype:
            raise Incompatible(
                f"wire_dtype differs: {self._config.wire_dtype!r} here, {message.wire_dtype!r} there",
                field="wire_dtype",
            )
        connector = self._choose(message.offers)
        if self._is_closed:
            raise StaleMessage("this rank is closing", field="generation")
        old = self._links.get(message.receiver)
        session = old.session if old is not None else SenderSession(message.receiver)
        if not session.connect(message):
            assert old is not None and old.answer is not None
            return await asyncio.shield(old.answer)
        channel = ChannelId(self._identity.address, message.receiver, message.receiver_incarnation, message.generation)
        link = self._links[message.receiver] = _Link(session, channel)
        link.answer = asyncio.create_task(self._build(link, connector, message.wire_dtype, old))
        link.answer.add_done_callback(drop_result)
        return await asyncio.shield(link.answer)

    async def on_ready(self, message: Ready) -> Granted:
        """Queues the granted slabs but for those that may not be read. A repeated grant is not obeyed again.

        Raises StaleMessage, field "generation", when the channel is not this one.
        """
        link = self._links.get(message.receiver)
        if link is None or link.end is None or not link.end.is_open or link.channel not in self._pairs:
            raise StaleMessage(f"no open channel to {message.receiver}", field="generation")
        granted = link.session.ready(message)
        link.refused.update(header.sequence for header in granted if not self.is_readable(header))
        for header in granted:
            if header.sequence not in link.refused:
                self._send(link, link.end, header)
        return Granted(bool(granted), tuple(h.sequence for h in message.slabs if h.sequence in link.refused))

    async def on_close(self, message: CloseChannel) -> Acknowledged:
        """Ends a channel that its receiver has given up; another generation is left alone."""
        link = self._links.get(message.receiver)
        if link is None or not link.session.close(message):
            return Acknowledged(known=False)
        await self._end(link, "closed by the receiver")
        return Acknowledged()

    def is_readable(self, header: SlabHeader) -> bool:
        """Whether a slab's source lies inside the pool and holds what its request wants."""
        try:
            require_inside(self._pool, header.source)
        except TransferFailed:
            return False
        return self._may_read(header)

    async def close(self) -> None:
        """Ends all channels."""
        self._is_closed = True
        await asyncio.gather(*(self._end(link, "closing") for link in list(self._links.values())))

    def _choose(self, offers: Sequence[Offer]) -> Connector:
        """The first of the receiver's transports that this rank has too, with the same reach."""
        ours = [Offer(connector.kind, connector.reach) for connector in self._connectors.values()]
        for kind in common(offers, ours):
            return self._connectors[kind]
        theirs = ", ".join(offer.kind for offer in offers)
        raise Incompatible(
            f"no transport in common: {', '.join(self._connectors)} here, {theirs} there", field="transfer.channel"
        )

    async def _build(self, link: _Link, connector: Connector, wire_dtype: str, old: _Link | None) -> Connected:
        """Makes this end once the older one is over and there is room. Raises TransferFailed, StaleMessage."""
        channel = link.channel
        try:
            if old is not None:
                await self._end(old, "replaced by a newer generation")
            num_bytes = channel_bytes(connector.kind, int(self._config.slab_mib * 2**20))
            timeout_s = self._config.control_timeout_s
            await self._pairs.open(channel, num_bytes, lambda: self._end(link, "its memory is wanted"), timeout_s)
        except TransferFailed:
            await self._end(link, "no memory for it")
            raise
        if self._links.get(channel.receiver) is not link:
            self._pairs.forget(channel)
            raise StaleMessage(f"{channel} was overtaken", field="generation")
        token = secrets.token_hex(16)
        link.end = connector.sender_end(Terms(channel, token, wire_dtype))
        return Connected(self._identity.incarnation, connector.rendezvous, connector.kind, token)

    def _send(self, link: _Link, end: SenderEnd, header: SlabHeader) -> None:
        self._pairs.use(link.channel)
        when_done(end.send(header, self._config.data_timeout_s), partial(self._sent, link, header))

    def _sent(self, link: _Link, header: SlabHeader, future: "Future[Passage]") -> None:
        self._pairs.rest(link.channel)
        if future.exception() is None:
            passage = future.result()
            moments = passage.begun_at, passage.turned_at, passage.done_at
            for phase, (begun_at, ended_at) in zip(("gather", "wire"), pairwise(moments), strict=True):
                if ended_at > begun_at:
                    self._timeline.add(
                        TimelineEvent(
                            header.request_id,
                            header.attempt,
                            phase,
                            link.channel.receiver,
                            begun_at,
                            ended_at,
                            passage.num_bytes,
                        )
                    )

    async def _end(self, link: _Link, reason: str) -> None:
        """Idempotent; on return no source is read any more."""
        if self._links.get(link.channel.receiver) is link:
            del self._links[link.channel.receiver]
            link.session.end()
        self._pairs.forget(link.channel)
        if link.end is not None:
            await asyncio.to_thread(link.end.abort, reason)

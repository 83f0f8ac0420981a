"""Channels that a rank receives on: how one is agreed on with its sender, made, and given up."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from core.config import TransferConfig
from core.errors import Incompatible, PeerLost, TransferFailed
from core.kv_budget import channel_bytes
from core.kv_layout import Compatibility, KVLayout
from core.messages.to_rank import CloseChannel, Connect, Connected, Offer
from kv_transfer.channels.choice import TransportChoice
from kv_transfer.channels.protocol import ChannelId, Connector, Passage, ReceiverEnd, Terms
from kv_transfer.pairs import Pairs
from kv_transfer.peer_control import PeerControl

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """Who this rank is to its peers."""

    address: str
    incarnation: int
    compatibility: Compatibility
    layout: KVLayout


@dataclass(eq=False)
class Link:
    """One generation of the channel from a peer, as its receiver sees it."""

    peer: str
    generation: int
    kind: str
    end: ReceiverEnd
    next_sequence: int = 0
    has_moved: bool = False  # a slab came over it
    is_granting: bool = False  # a grant waits for the peer's answer; the order of grants is that of fetches

    @property
    def key(self) -> tuple[str, int]:
        """Its name among the rank's pairs."""
        return self.peer, self.generation


class Linker:
    """Makes and ends links. Generations grow over all peers, so that none is ever used twice."""

    def __init__(
        self,
        identity: Identity,
        config: TransferConfig,
        control: PeerControl,
        connectors: Sequence[Connector],
        pairs: Pairs,
    ) -> None:
        self._identity = identity
        self._config = config
        self._control = control
        self._connectors = {connector.kind: connector for connector in connectors}
        self._pairs = pairs
        self._generations = count(1)
        trial_bytes = int(config.trial_mib * 2**20) if config.channel == "measured" else 0
        self._choice = TransportChoice(list(self._connectors), trial_bytes)

    async def connect(self, peer: str, close: Callable[[Link], Awaitable[object]]) -> Link:
        """The next generation; `close` ends it when its memory is wanted for another channel.

        Raises PeerLost, TransferFailed, Incompatible naming the field.
        """
        timeout_s = self._config.connect_timeout_s
        kinds = self._choice.offers(peer)
        generation, connected = await self._agree(peer, kinds)
        link = Link(peer, generation, connected.kind, self._end(peer, generation, connected))
        num_bytes = channel_bytes(connected.kind, int(self._config.slab_mib * 2**20))
        try:
            await self._pairs.open(link.key, num_bytes, lambda: close(link), timeout_s)
        except TransferFailed:
            await self.end(link, "no memory for it")
            raise
        return link

    async def _agree(self, peer: str, kinds: Sequence[str]) -> tuple[int, Connected]:
        """A generation's number and what the sender says to it."""
        generation, me = next(self._generations), self._identity
        offers = tuple(Offer(kind, self._connectors[kind].reach) for kind in kinds)
        message = Connect(
            me.address, me.incarnation, generation, me.compatibility, me.layout, offers, self._config.wire_dtype
        )
        try:
            connected = await within(self._config.connect_timeout_s, peer, self._control.connect(peer, message))
        except Incompatible as error:
            others = set(self._connectors) - set(kinds)
            if error.field != "transfer.channel" or not others:
                raise
            self._choice.taken(peer, kinds, None)
            return await self._agree(peer, [kind for kind in self._connectors if kind in others])
        self._choice.taken(peer, kinds, connected.kind)
        return generation, connected

    async def end(self, link: Link, reason: str) -> None:
        """Ends a link here and, as far as it can be told, at the peer; on return nothing is written through it."""
        self._pairs.forget(link.key)
        if not link.end.is_open and not link.has_moved:
            self._choice.failed(link.peer, link.kind)
        await asyncio.to_thread(link.end.abort, reason)
        message = CloseChannel(self._identity.address, self._identity.incarnation, link.generation)
        try:
            await within(self._config.control_timeout_s, link.peer, self._control.close(link.peer, message))
        except PeerLost:
            return

    def use(self, link: Link) -> None:
        """A slab is on its way; the link keeps its memory."""
        self._pairs.use(link.key)

    def rest(self, link: Link) -> None:
        """A slab is over."""
        self._pairs.rest(link.key)

    def moved(self, link: Link, passage: Passage) -> None:
        """A slab came."""
        link.has_moved = True
        self._choice.moved(link.peer, link.kind, passage.num_bytes, passage.done_at - passage.begun_at)

    def is_usable(self, link: Link) -> bool:
        """Whether slabs may be granted on it: it has not failed, and no other transport is due."""
        return link.end.is_open and not self._choice.is_spent(link.peer, link.kind)

    def _end(self, peer: str, generation: int, connected: Connected) -> ReceiverEnd:
        connector = self._connectors.get(connected.kind)
        if connector is None:
            raise TransferFailed(f"{peer} chose transport {connected.kind!r}, which was not offered")
        channel = ChannelId(peer, self._identity.address, self._identity.incarnation, generation)
        return connector.receiver_end(Terms(channel, connected.token, self._config.wire_dtype), connected.rendezvous)


async def within(timeout_s: float, peer: str, call: Awaitable[T]) -> T:
    """Raises PeerLost when the peer does not answer in time."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except TimeoutError as error:
        raise PeerLost(f"{peer} did not answer within {timeout_s} s") from error

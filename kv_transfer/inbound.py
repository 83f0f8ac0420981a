"""What one rank receives from one peer: the channel of the current generation, its grants and its credits."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from core.config import TransferConfig
from core.errors import BatonError, PeerLost, StaleMessage, TransferFailed
from core.kv_layout import Compatibility, KVLayout
from core.messages.to_rank import CloseChannel, Connect, Copy, Ready, SlabHeader
from kv_transfer.channels.protocol import ChannelId, Connector, Passage, ReceiverEnd, Terms
from kv_transfer.peer_control import PeerControl
from kv_transfer.transfer import Transfer, drop_result, finish, release_from_thread

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """Who this rank is to its peers."""

    address: str
    incarnation: int
    compatibility: Compatibility
    layout: KVLayout


class _Link:
    """One generation of the channel, as its receiver sees it."""

    def __init__(self, generation: int, end: ReceiverEnd, window_slabs: int) -> None:
        self.generation = generation
        self.end = end
        self.next_sequence = 0
        self.window = asyncio.Semaphore(window_slabs)
        self.grants = asyncio.Lock()  # the order of grants is the order of fetches


class Inbound:
    """Fetches from one peer, for any number of transfers at a time. Belongs to one event loop."""

    def __init__(
        self,
        peer: str,
        identity: Identity,
        config: TransferConfig,
        control: PeerControl,
        connector: Connector,
        in_flight: asyncio.Semaphore,
    ) -> None:
        """`in_flight` is shared by all peers and caps the slabs that the rank receives at a time."""
        self._peer = peer
        self._identity = identity
        self._config = config
        self._control = control
        self._connector = connector
        self._in_flight = in_flight
        self._generation = 0
        self._link: _Link | None = None
        self._linking = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def fetch(self, transfer: Transfer, slabs: Sequence[Copy]) -> int:
        """Receives slabs in order; returns the bytes written. Raises TransferFailed, PeerLost or Incompatible.

        A peer that does not know the channel (it restarted) is connected to anew, once.
        """
        waiting = deque(slabs)
        coming: list[Future[Passage]] = []
        may_relink = True
        while waiting:
            link = await self._linked()
            batch = await self._take_credits(link, waiting)
            try:
                coming += await asyncio.shield(self._spawn(self._grant(link, transfer, batch)))
            except StaleMessage as error:
                if error.field != "generation" or not may_relink:
                    raise TransferFailed(f"{self._peer} refused: {error}") from error
                may_relink = False
                waiting.extendleft(reversed(batch))
            for future in coming:
                if future.done():
                    future.result()
        return sum([(await asyncio.wrap_future(future)).num_bytes for future in coming])

    async def close(self, reason: str) -> None:
        """Ends the channel and everything that waits on it."""
        if self._link is not None:
            await finish(self._drop(self._link, reason))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- connecting ---------------------------------------------------------------------------------------------

    async def _linked(self) -> _Link:
        """The open link; builds the next generation when there is none."""
        async with self._linking:
            if self._link is not None and not self._link.end.is_open:
                await self._drop(self._link, "failed")
            if self._link is None:
                self._link = await self._connect()
            return self._link

    async def _connect(self) -> _Link:
        self._generation += 1
        me = self._identity
        message = Connect(me.address, me.incarnation, self._generation, me.compatibility, me.layout)
        timeout_s = self._config.connect_timeout_s
        connected = await self._within(timeout_s, self._control.connect(self._peer, message))
        channel = ChannelId(self._peer, me.address, me.incarnation, self._generation)
        end = self._connector.receiver_end(Terms(channel, ""), connected.rendezvous)
        return _Link(self._generation, end, self._config.window_slabs)

    async def _drop(self, link: _Link, reason: str) -> None:
        """Ends a link here and, as far as it can be told, at the peer."""
        if self._link is link:
            self._link = None
        self._spawn(self._tell_closed(link.generation))
        await asyncio.to_thread(link.end.abort, reason)

    async def _tell_closed(self, generation: int) -> None:
        message = CloseChannel(self._identity.address, self._identity.incarnation, generation)
        await self._within(self._config.control_timeout_s, self._control.close(self._peer, message))

    # ---- granting -----------------------------------------------------------------------------------------------

    async def _take_credits(self, link: _Link, waiting: deque[Copy]) -> list[Copy]:
        """Waits for one slab's credits, then takes along what more the window and the rank allow now."""
        await link.window.acquire()
        try:
            await self._in_flight.acquire()
        except asyncio.CancelledError:
            link.window.release()
            raise
        batch = [waiting.popleft()]
        while waiting and not link.window.locked() and not self._in_flight.locked():
            await link.window.acquire()
            await self._in_flight.acquire()
            batch.append(waiting.popleft())
        return batch

    async def _grant(self, link: _Link, transfer: Transfer, batch: list[Copy]) -> list["Future[Passage]"]:
        """Tells the sender, then posts the fetches in the same order. Runs to its end even if its caller is gone.

        Credits come back when their slab is off the wire, or at once when nothing was granted.
        """
        posted: list[Future[Passage]] = []
        try:
            async with link.grants:
                headers = self._headers(link, transfer, batch)
                await self._tell_ready(link, headers)
                link.next_sequence += len(headers)
                for header, copy in zip(headers, batch, strict=True):
                    posted.append(self._post(link, transfer, header, copy))
        finally:
            for _ in range(len(batch) - len(posted)):
                link.window.release()
                self._in_flight.release()
        return posted

    def _headers(self, link: _Link, transfer: Transfer, batch: list[Copy]) -> tuple[SlabHeader, ...]:
        return tuple(
            SlabHeader(link.next_sequence + index, transfer.request_id, transfer.attempt, copy.source)
            for index, copy in enumerate(batch)
        )

    async def _tell_ready(self, link: _Link, headers: tuple[SlabHeader, ...]) -> None:
        """Raises StaleMessage when nothing was granted; after any other failure nobody knows, so the link ends."""
        if not link.end.is_open:
            raise StaleMessage("the channel has failed", field="generation")
        ready = Ready(self._identity.address, self._identity.incarnation, link.generation, headers)
        try:
            await self._within(self._config.control_timeout_s, self._control.ready(self._peer, ready))
        except StaleMessage as error:
            if error.field == "generation":
                await self._drop(link, "unknown to the sender")
            raise
        except (BatonError, asyncio.CancelledError):
            await finish(self._drop(link, "a grant went unanswered"))
            raise

    def _post(self, link: _Link, transfer: Transfer, header: SlabHeader, copy: Copy) -> "Future[Passage]":
        future = link.end.fetch(header, copy.destination, transfer.landing, self._config.data_timeout_s)
        release_from_thread(asyncio.get_running_loop(), future, link.window, self._in_flight)
        return future

    # ---- small helpers ------------------------------------------------------------------------------------------

    async def _within(self, timeout_s: float, call: Awaitable[T]) -> T:
        """Raises PeerLost when the peer does not answer in time."""
        try:
            return await asyncio.wait_for(call, timeout_s)
        except TimeoutError as error:
            raise PeerLost(f"{self._peer} did not answer within {timeout_s} s") from error

    def _spawn(self, work: Coroutine[None, None, T]) -> "asyncio.Task[T]":
        """A task that lives on when its creator is cancelled; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(drop_result)
        return task

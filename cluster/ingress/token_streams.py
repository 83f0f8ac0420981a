"""Tokens on their way in: one stream per decode replica, shared by all requests that it serves for this ingress."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from cluster.ingress.pacer import Pacer
from core.config import TransferConfig
from core.errors import BatonError, Overloaded, PeerLost
from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import RenewLeases, TokenEvent, TokensFrom
from rpc.client import RpcClient
from rpc.methods import RENEW_LEASES, TOKENS

logger = logging.getLogger(__name__)


class Subscription:
    """The events of one attempt. Bounded: a client that does not read makes its own request fail, nobody else's."""

    def __init__(
        self, request_id: str, attempt: int, max_events: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self.opened = False  # decode knows the request; from then on it must not forget it
        self.was_unknown = False  # to decode at the last heartbeat: if it ended, its last event may still be on its way
        self.broken = asyncio.Event()  # decode gave the attempt up, or is lost: `next` will say so
        self.pacer = Pacer()  # hears of tokens as they come, however late the client reads them
        self._max_events = max_events
        self._clock = clock
        self._events: asyncio.Queue[TokenEvent | BatonError] = asyncio.Queue()

    def deliver(self, item: TokenEvent | BatonError) -> None:
        """An event of this attempt, or what ended it."""
        if isinstance(item, TokenEvent) and item.attempt != self.attempt:
            return
        if isinstance(item, TokenEvent) and item.token_ids:
            self.pacer.decoded(item.first_index + len(item.token_ids), self._clock())
        if self._events.qsize() == self._max_events:
            item = Overloaded(f"the client left {self._max_events} tokens unread")
        if isinstance(item, BatonError) or item.finish_reason == "resume":
            self.broken.set()
        if self._events.qsize() <= self._max_events:
            self._events.put_nowait(item)

    def prefilled(self) -> None:
        """Prefill's token has come."""
        self.pacer.prefilled(self._clock())

    async def next(self) -> TokenEvent:
        """The next event. Raises what ended the subscription."""
        item = await self._events.get()
        if isinstance(item, BatonError):
            raise item
        return item


class _ReplicaStream:
    """The stream from one incarnation of a decode replica, and who listens to it."""

    def __init__(self, replica: ReplicaInfo) -> None:
        self.replica = replica
        self.subscriptions: dict[str, Subscription] = {}
        self.task: asyncio.Task[None] | None = None

    def fail_all(self, error: BatonError) -> None:
        for subscription in self.subscriptions.values():
            subscription.deliver(error)


class TokenStreams:
    """All streams of one ingress. `close` ends them."""

    def __init__(self, ingress_id: str, client: RpcClient, config: TransferConfig, max_events: int) -> None:
        self._ingress_id = ingress_id
        self._client = client
        self._config = config
        self._max_events = max_events
        self._streams: dict[tuple[str, int], _ReplicaStream] = {}
        self._heartbeat: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def subscribe(self, replica: ReplicaInfo, request_id: str, attempt: int) -> AsyncIterator[Subscription]:
        """Listens for one attempt on one replica; opens the replica's stream when nobody did before."""
        key = (replica.replica_id, replica.incarnation)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = _ReplicaStream(replica)
            stream.task = asyncio.create_task(self._receive(key, stream))
        if self._heartbeat is None:
            self._heartbeat = asyncio.create_task(self._renew_leases())
        subscription = stream.subscriptions[request_id] = Subscription(request_id, attempt, self._max_events)
        try:
            yield subscription
        finally:
            if stream.subscriptions.get(request_id) is subscription:
                del stream.subscriptions[request_id]

    async def close(self) -> None:
        """Ends every stream and the heartbeat."""
        tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
        if self._heartbeat is not None:
            tasks.append(self._heartbeat)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, key: tuple[str, int], stream: _ReplicaStream) -> None:
        """Reads frames; a broken stream is attached again within the grace time, a dead replica fails its requests."""
        clock = time.monotonic
        address = stream.replica.address
        last_alive = clock()
        error: BatonError = PeerLost(f"decode replica {stream.replica.replica_id} is lost")
        try:
            while clock() - last_alive < self._config.reattach_grace_s:
                attached = False
                try:
                    async with (
                        aclosing(self._client.stream(address, TOKENS, TokensFrom(self._ingress_id))) as frames,
                        asyncio.timeout(self._config.control_timeout_s) as attaching,
                    ):
                        async for frame in frames:
                            attached = True
                            attaching.reschedule(None)
                            for event in frame.events:
                                if event.request_id in stream.subscriptions:
                                    stream.subscriptions[event.request_id].deliver(event)
                    break  # decode ended the stream: it goes, or another stream of ours replaced this one
                except TimeoutError:  # what hangs takes connections and never answers on them
                    error = PeerLost(f"{address} did not attach the token stream in time", field="decode")
                except PeerLost as lost:
                    error = PeerLost(lost.message, field="decode")
                    if "refused" in lost.message.lower():
                        break
                    if attached:
                        last_alive = clock()
                    await asyncio.sleep(0.05)
        except BatonError as refused:
            error = refused
        finally:
            del self._streams[key]
            stream.fail_all(error)

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_ttl_s / 3)
            await asyncio.gather(*(self._renew(stream) for stream in list(self._streams.values())))

    async def _renew(self, stream: _ReplicaStream) -> None:
        opened = [s for s in stream.subscriptions.values() if s.opened]
        if not opened:
            return
        message = RenewLeases(self._ingress_id, tuple(s.request_id for s in opened))
        try:
            answer = await self._client.call(
                stream.replica.address, RENEW_LEASES, message, self._config.control_timeout_s
            )
        except BatonError as error:
            logger.warning("leases on %s were not renewed: %s", stream.replica.replica_id, error)
            return
        for subscription in opened:
            is_unknown = subscription.request_id in answer.unknown
            if is_unknown and subscription.was_unknown:
                subscription.deliver(PeerLost("decode has forgotten the request", field="decode"))
            subscription.was_unknown = is_unknown

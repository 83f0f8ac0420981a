"""The ingress's line to the global scheduler, and how it plans by itself while the scheduler is away."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from cluster.ingress.generation import FleetHealth
from cluster.ingress.plan_alone import plan_alone
from cluster.ingress.schedulers import Resolve, Schedulers
from core.errors import BatonError, PeerLost
from core.messages.fleet import Acknowledged, Empty, ReplicaInfo, Role
from core.messages.to_scheduler import (
    Book,
    Decisions,
    Finish,
    FleetStatus,
    Plan,
    Progress,
    Renew,
    Reserve,
    SetTraffic,
    Traffic,
    Why,
)
from rpc.client import RpcClient
from rpc.methods import BOOK, FINISH, FLEET, PROGRESS, RENEW, RESERVE, SET_TRAFFIC, WHY, Unary

logger = logging.getLogger(__name__)

BOOK_INTERVAL_S = 0.5
BOOK_GRACE_S = 3.0
RENEW_INTERVAL_S = 5.0
CALL_TIMEOUT_S = 2.0
LOOK_AROUND_S = 1.0
TELL_PAUSES_S = (0.0, 0.0, 0.5, 1.0, 2.0)  # before each try; at worst half of the time after which reservations expire


class SchedulerClient:
    """Each of `resolves` finds a scheduler's present address; the first one's is preferred, a standby's comes next."""

    def __init__(self, client: RpcClient, *resolves: Resolve) -> None:
        self._client = client
        self._schedulers = Schedulers(resolves, CALL_TIMEOUT_S)
        self._replicas: tuple[ReplicaInfo, ...] = ()
        self._longest: int | None = None  # sequence that the last decode replicas could hold
        self._can_grow = False  # by the last address book: an autoscaler is at work
        self._weights: dict[str, float] = {}  # of the traffic split, by generation
        self._good_at = 0.0
        self._in_use: dict[str, int] = {}  # decode replica id -> requests of this ingress, for planning alone
        self._reserved: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reachable = False
        self._chance = random.Random()

    def start(self) -> None:
        """Begins to follow the scheduler's address book."""
        self._spawn(self._follow_book())
        self._spawn(self._renew())
        self._spawn(self._look_around())

    async def close(self) -> None:
        """Ends the background tasks."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def health(self) -> FleetHealth:
        """From the last address book."""
        roles = {replica.role for replica in self._replicas}
        if Role.DECODE not in roles and not (self._reachable and self._can_grow):
            return FleetHealth(False, "no decode replica")
        if Role.DECODE not in roles:
            waits = "no decode replica: requests wait until one has started"
            return FleetHealth(True, waits, self._longest)
        missing = [] if Role.PREFILL in roles else ["no prefill replica: decode prefills by itself"]
        if not self._reachable:
            missing.append("the global scheduler is away: requests are placed without it")
        elif self._schedulers.on_standby:
            missing.append("the first global scheduler is away: its standby plans")
        return FleetHealth(True, "; ".join(missing), self._longest)

    async def fleet(self) -> FleetStatus:
        """The scheduler's view. Raises PeerLost while it is away."""
        address = await self._schedulers.address()
        return await self._client.call(address, FLEET, Empty(), CALL_TIMEOUT_S)

    async def why(self, request_id: str) -> Decisions:
        """What the scheduler decided about a request. Raises PeerLost while it is away."""
        address = await self._schedulers.address()
        return await self._client.call(address, WHY, Why(request_id), CALL_TIMEOUT_S)

    async def set_traffic(self, weights: dict[str, float] | None) -> Traffic:
        """Raises PeerLost while the scheduler is away, InvalidParameter."""
        address = await self._schedulers.address()
        return await self._client.call(address, SET_TRAFFIC, SetTraffic(weights), CALL_TIMEOUT_S)

    @asynccontextmanager
    async def reservation(self, request: Reserve, finish: Callable[[], Finish]) -> AsyncIterator[Plan]:
        """A plan, held until the block ends. Waits in the scheduler's queue. Raises Overloaded, NoReplica.

        `finish` says in the end what came of it.
        """
        plan: Plan | None = None
        try:
            plan = await self._reserve(request)
            self._in_use[plan.decode.replica_id] = self._in_use.get(plan.decode.replica_id, 0) + 1
            self._reserved.add(request.request_id)
            yield plan
        finally:
            if plan is not None:
                self._in_use[plan.decode.replica_id] -= 1
                if not self._in_use[plan.decode.replica_id]:
                    del self._in_use[plan.decode.replica_id]
            self._reserved.discard(request.request_id)
            self._spawn(self._tell(FINISH, finish()))

    def progress(self, request_id: str, num_cached_tokens: int | None) -> None:
        """The request's first token is out; prefill found so many tokens of the prompt cached."""
        self._spawn(self._tell(PROGRESS, Progress(request_id, num_cached_tokens)))

    async def _reserve(self, request: Reserve) -> Plan:
        """Who knows replicas waits for no scheduler that has to be looked for; the address book's reader does that."""
        for _ in range(2):
            address = self._schedulers.known_address
            if not address and self._replicas:
                break
            try:
                address = address or await self._schedulers.address()
                message = replace(request, num_known_replicas=len(self._replicas))
                return await self._client.call(address, RESERVE, message, request.timeout_s + CALL_TIMEOUT_S)
            except PeerLost as error:
                logger.warning("the global scheduler does not answer: %s", error)
                self._schedulers.failed(address)
        return plan_alone(request, self._replicas, self._weights, self._in_use, self._chance)

    async def _follow_book(self) -> None:
        while True:
            address = ""
            try:
                address = await self._schedulers.address()
                self._take(await self._client.call(address, BOOK, Empty(), CALL_TIMEOUT_S))
            except BatonError as error:
                logger.info("no address book: %s", error)
                self._reachable = False
                self._schedulers.failed(address)
            await asyncio.sleep(BOOK_INTERVAL_S)

    async def _look_around(self) -> None:
        """Goes back to the first scheduler when it knows replicas again."""
        while True:
            first = await self._schedulers.look_around()
            if first:
                with suppress(BatonError):
                    if (await self._client.call(first, BOOK, Empty(), CALL_TIMEOUT_S)).replicas:
                        self._schedulers.return_to_first()
            await asyncio.sleep(LOOK_AROUND_S)

    def _take(self, book: Book) -> None:
        """A scheduler that has just started knows nobody yet: the last good book stays good for a moment."""
        self._reachable = True
        now = time.monotonic()
        if lengths := [replica.max_model_len for replica in book.replicas if replica.role is Role.DECODE]:
            self._longest = max(lengths)
            self._replicas, self._weights, self._good_at = book.replicas, book.weights, now
        elif now - self._good_at > BOOK_GRACE_S:
            self._replicas = book.replicas
        self._can_grow = book.can_grow

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_INTERVAL_S)
            if self._reserved:
                await self._tell(RENEW, Renew(tuple(self._reserved)))

    async def _tell(self, method: Unary[Any, Acknowledged], message: object) -> None:
        """More than once if need be: a Finish that is lost holds its reservation until that expires."""
        for pause_s in TELL_PAUSES_S:
            await asyncio.sleep(pause_s)
            address = ""
            try:
                address = await self._schedulers.address()
                await self._client.call(address, method, message, CALL_TIMEOUT_S)
                return
            except BatonError as error:
                logger.info("%s was not told to the scheduler: %s", method.name, error)
                self._schedulers.failed(address)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

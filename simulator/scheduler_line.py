"""An ingress's line to the global scheduler: the twin of cluster/ingress/scheduler_client.py. Pure."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cluster.ingress.plan_alone import plan_alone
from core.errors import BatonError, NoReplica, PeerLost
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import Book, Finish, Plan, Progress, Renew, Reserve
from simulator.events import TIMER
from simulator.host import World
from simulator.scheduler_process import SchedulerProcess
from simulator.wire import Failed, Process

BOOK_INTERVAL_S = 0.5
BOOK_GRACE_S = 3.0
RENEW_INTERVAL_S = 5.0
CALL_TIMEOUT_S = 2.0
NUM_TRIES = 2


class SchedulerLine:
    """Plans by itself when the scheduler does not answer twice."""

    def __init__(self, world: World, owner: Process, scheduler: SchedulerProcess, chance: random.Random) -> None:
        self._world = world
        self._owner = owner
        self._scheduler = scheduler
        self._chance = chance
        self._replicas: tuple[ReplicaInfo, ...] = ()
        self._is_away = False  # its address has to be looked up
        self._weights: dict[str, float] = {}
        self._good_at = 0.0
        self._in_use: dict[str, int] = {}
        self._reserved: dict[str, None] = {}
        self.num_alone = 0

    def start(self) -> None:
        """Begins to follow the address book, and to renew."""
        self._follow_book()
        self._later(RENEW_INTERVAL_S, self._renew)

    def reserve(self, request: Reserve, planned: Callable[[Plan], None], failed: Failed) -> None:
        """Calls `planned` with a plan that is held until `release`, or `failed`."""
        self._try(request, planned, failed, NUM_TRIES)

    def hold(self, plan: Plan) -> None:
        """A plan is being carried out."""
        decode_id = plan.decode.replica_id
        self._in_use[decode_id] = self._in_use.get(decode_id, 0) + 1
        self._reserved[plan.request_id] = None

    def release(self, request_id: str, attempt: int, plan: Plan | None, num_output_tokens: int | None) -> None:
        """The attempt is over, whether it got a plan or not; with all tokens, if the request has come to its end."""
        if plan is not None:
            decode_id = plan.decode.replica_id
            self._in_use[decode_id] -= 1
            if not self._in_use[decode_id]:
                del self._in_use[decode_id]
            self._reserved.pop(request_id, None)
        self._tell(self._scheduler.finish, Finish(request_id, attempt, num_output_tokens))

    def progress(self, request_id: str, num_cached_tokens: int | None) -> None:
        """The request's first token is out."""
        self._tell(self._scheduler.progress, Progress(request_id, num_cached_tokens))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _try(self, request: Reserve, planned: Callable[[Plan], None], failed: Failed, left: int) -> None:
        if not left or (self._is_away and self._replicas):
            self.num_alone += 1
            try:
                plan = plan_alone(request, self._replicas, self._weights, self._in_use, self._chance)
            except NoReplica as error:
                failed(error)
                return
            planned(plan)
            return

        def refused(error: BatonError) -> None:
            if not isinstance(error, PeerLost):
                failed(error)
                return
            self._is_away = True
            self._later(0.0 if self._replicas else self._resolve_s(), self._try, request, planned, failed, left - 1)

        scheduler, message = self._scheduler, replace(request, num_known_replicas=len(self._replicas))
        self._world.wire.tell(
            self._owner.number, scheduler, scheduler.reserve, message, planned, refused, failed=refused
        )

    def _resolve_s(self) -> float:
        """Until the scheduler's new address is known, or nobody knew it."""
        if self._scheduler.alive:
            return 2 * self._world.wire.latency_s
        return min(CALL_TIMEOUT_S, max(0.0, self._scheduler.back_at - self._world.queue.now))

    def _tell(self, handle: Callable[..., None], message: Finish | Progress) -> None:
        """Twice if need be."""
        wire, number, scheduler = self._world.wire, self._owner.number, self._scheduler
        if scheduler.alive:
            wire.tell(number, scheduler, handle, message)
            return
        self._later(self._resolve_s(), partial(wire.tell, number, scheduler), handle, message)

    def _follow_book(self) -> None:
        if self._scheduler.alive:
            self._is_away = False
            self._take(self._scheduler.book())
        self._later(BOOK_INTERVAL_S, self._follow_book)

    def _take(self, book: Book) -> None:
        """A scheduler that has just started knows nobody yet: the last good book stays good for a moment."""
        now = self._world.queue.now
        if any(replica.role is Role.DECODE for replica in book.replicas):
            self._replicas, self._weights, self._good_at = book.replicas, book.weights, now
        elif now - self._good_at > BOOK_GRACE_S:
            self._replicas = book.replicas

    def _renew(self) -> None:
        if self._reserved:
            wire, scheduler = self._world.wire, self._scheduler
            wire.tell(self._owner.number, scheduler, scheduler.renew, Renew(tuple(self._reserved)))
        self._later(RENEW_INTERVAL_S, self._renew)

    def _later(self, seconds: float, action: Callable[..., None], *args: object) -> None:
        self._world.queue.at(self._world.queue.now + seconds, TIMER, self._owner.number, action, *args)

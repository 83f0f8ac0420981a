"""The global scheduler's process: the production Admission behind the twin of cluster/scheduler_service.py. Pure."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import inf

from cluster.autoscaling.signals import FleetSignals
from cluster.scheduler.admission import Admission
from cluster.scheduler.asked_sizes import Asked
from cluster.scheduler.fleet_signals import fleet_signals
from core.errors import BatonError, PeerLost
from core.messages.fleet import Role
from core.messages.to_decode import MakeRoom
from core.messages.to_lender import TakeOver
from core.messages.to_scheduler import Book, Finish, Plan, Progress, Renew, Report, Reserve
from simulator.events import MESSAGE, TIMER
from simulator.host import World
from simulator.peers import Peers
from simulator.wire import Failed

HOUSEKEEPING_S = 0.1
MISSED_TICKS = 5
WALL_START = datetime(2025, 1, 6, tzinfo=UTC)  # a Monday: where the trace begins on the clock of schedules


class SchedulerProcess:
    """`make` builds an empty Admission, also after a restart."""

    def __init__(self, world: World, number: int, make: Callable[[], Admission], peers: Peers) -> None:
        self._world = world
        self.number = number
        self.alive = True
        self.incarnation = 0
        self.back_at = 0.0  # when it is down: until then
        self._make = make
        self._peers = peers
        self.num_copies = 0
        self.admission = make()
        self._pending: dict[str, tuple[int, Callable[[Plan], None], Failed]] = {}
        self._next_dispatch_at = inf
        self._expected: dict[tuple[str, int], int] = {}  # the next report's number, by replica and incarnation

    def start(self) -> None:
        """Begins to keep house."""
        self._world.queue.at(
            self._world.queue.now + HOUSEKEEPING_S, TIMER, self.number, self._housekeep, self.incarnation
        )

    # ---- calls --------------------------------------------------------------------------------------------------

    def reserve(self, message: Reserve, reply: Callable[[Plan], None], failed: Failed) -> None:
        """Pending until there is room."""
        self.admission.reserve(message, self._now)
        self._pending[message.request_id] = message.attempt, reply, failed
        self._dispatch()

    def progress(self, message: Progress) -> None:
        """Prefill of a request is over."""
        self.admission.progress(message, self._now)
        self._dispatch()

    def finish(self, message: Finish) -> None:
        """A request is over, or its client no longer waits for a plan."""
        pending = self._pending.get(message.request_id)
        if pending is not None and pending[0] <= message.attempt:
            del self._pending[message.request_id]
        self.admission.finish(message.request_id, message.attempt, self._now, message.num_output_tokens)
        self._dispatch()

    def renew(self, message: Renew) -> None:
        """An ingress's heartbeat."""
        self.admission.reservations.renew(message.request_ids, self._now)

    def report(self, incarnation: int, report: Report) -> None:
        """Of a watch that this incarnation opened."""
        key = report.info.replica_id, report.info.incarnation
        if incarnation != self.incarnation or report.sequence != self._expected.get(key, 0):
            return
        self._expected[key] = report.sequence + 1
        self.admission.report(report, self._now)
        self._dispatch()

    def lost(self, replica_id: str, incarnation: int) -> None:
        """The stream of an incarnation's reports broke."""
        known = self.admission.fleet.get(replica_id)
        if known is not None and known.info.incarnation == incarnation:
            self.admission.replica_lost(replica_id)

    def book(self) -> Book:
        """Replicas that take work."""
        admission, now = self.admission, self._now
        return Book(admission.book(now), admission.num_waiting, admission.traffic.weights, admission.can_grow(now))

    def signals(self, generation: str, asked: Asked, interval_s: float) -> FleetSignals:
        """For the autoscaler."""
        now = self._now
        self.admission.sizes.ask(generation, asked, now + MISSED_TICKS * interval_s)
        return fleet_signals(self.admission, generation, asked, now, WALL_START + timedelta(seconds=now))

    # ---- restart ------------------------------------------------------------------------------------------------

    def stop(self, back_at: float) -> None:
        """The process ends; whoever waits for a plan loses the call."""
        self.alive, self.back_at = False, back_at
        for _, _, failed in self._pending.values():
            self._world.wire.fail(self, failed, PeerLost("the global scheduler is gone"))
        self._pending.clear()

    def restart(self) -> None:
        """A new process, which knows nothing."""
        self.alive = True
        self.incarnation += 1
        self.admission = self._make()
        self._next_dispatch_at = inf
        self._expected.clear()
        self.start()

    # ---- inside -------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> float:
        return self._world.queue.now

    def _dispatch(self) -> None:
        if not self.admission.num_waiting:
            return
        self._give_plans()
        at = self.admission.take_held_until()
        if at >= self._now + HOUSEKEEPING_S:
            at = inf  # housekeeping comes before
        if at not in (self._next_dispatch_at, inf):
            self._world.queue.at(max(self._now, at), TIMER, self.number, self._dispatch_again, self.incarnation, at)
        self._next_dispatch_at = at
        wire = self._world.wire
        for yielding in self.admission.take_yields():
            decode = self._peers.decode(yielding.decode)
            message = MakeRoom(yielding.request_id, yielding.attempt)
            wire.tell(self.number, decode.host, decode.make_room, message)
        for copy in self.admission.take_copies():
            self.num_copies += 1
            taker = self._peers.prefill if copy.taker.role is Role.PREFILL else self._peers.decode
            replica = taker(copy.taker)
            order = TakeOver(f"copy.{self.incarnation}.{self.num_copies}", copy.block_hashes, copy.source)
            wire.tell(self.number, replica.host, replica.take_over, order)

    def _dispatch_again(self, incarnation: int, at: float) -> None:
        if incarnation == self.incarnation and self.alive and at == self._next_dispatch_at:
            self._dispatch()

    def _give_plans(self) -> None:
        for plan in self.admission.dispatch(self._now):
            pending = self._pending.pop(plan.request_id, None)
            if pending is not None and pending[0] == plan.attempt:
                self._answer(pending[1], plan)
            else:
                self.admission.finish(plan.request_id, plan.attempt, self._now)

    def _answer(self, reply: Callable[[Plan], None], plan: Plan) -> None:
        queue, wire = self._world.queue, self._world.wire
        queue.at(queue.now + wire.latency_s, MESSAGE, self.number, reply, plan)

    def _housekeep(self, incarnation: int) -> None:
        if incarnation != self.incarnation or not self.alive:
            return
        late: dict[str, BatonError] = self.admission.expire(self._now)
        for request_id, error in late.items():
            pending = self._pending.pop(request_id, None)
            if pending is not None:
                self._world.wire.fail(self, pending[2], error)
        self._dispatch()
        self.start()

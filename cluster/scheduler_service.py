"""The global scheduler as a process: Admission behind RPC, watching every replica that registers. Knows no Ray."""

import asyncio
import gc
import logging
import time
from collections.abc import Coroutine
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from cluster.autoscaling.signals import FleetSignals
from cluster.decision_record import DecisionRecorder, Event
from cluster.scheduler.admission import Admission
from cluster.scheduler.asked_sizes import Asked
from cluster.scheduler.batch_yields import Yielding
from cluster.scheduler.fleet_signals import fleet_signals
from cluster.scheduler.prefix_care import Copy
from core.errors import BatonError, InvalidParameter
from core.messages.fleet import Acknowledged, Empty, ReplicaInfo
from core.messages.to_decode import MakeRoom
from core.messages.to_lender import TakeOver
from core.messages.to_scheduler import (
    Book,
    Decisions,
    Deregister,
    Finish,
    FleetStatus,
    Plan,
    PoolSize,
    Progress,
    Register,
    Registered,
    Renew,
    Reserve,
    SetTraffic,
    Traffic,
    Watch,
    Why,
)
from core.security import Security
from rpc import methods
from rpc.client import RpcClient
from rpc.server import RpcServer

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.1
CONTROL_TIMEOUT_S = 2.0
COPY_TIMEOUT_S = 30.0
MISSED_TICKS = 5  # of an autoscaler, after which nobody waits for what it has asked for


class SchedulerService:
    """Thin shell: plans are handed to the calls that wait for them."""

    def __init__(
        self,
        admission: Admission,
        scheduler_id: str,
        host: str,
        security: Security,
        recorder: DecisionRecorder | None = None,
    ) -> None:
        self._id = scheduler_id
        self._host = host
        self._admission = admission
        self._recorder = recorder
        self._client = RpcClient(security)
        self._server = RpcServer(host, security)
        self._plans: dict[str, asyncio.Future[Plan]] = {}
        self._watches: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._housekeeping: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_copies = 0
        self._next_dispatch: asyncio.TimerHandle | None = None

    async def start(self, port: int = 0) -> str:
        """Listens; returns host:port."""
        unary = self._server.unary
        unary(methods.RESERVE, self.reserve)
        unary(methods.PROGRESS, self.progress)
        unary(methods.RENEW, self.renew)
        unary(methods.FINISH, self.finish)
        unary(methods.REGISTER, self.register)
        unary(methods.DEREGISTER, self.deregister)
        unary(methods.BOOK, self.book)
        unary(methods.FLEET, self.fleet)
        unary(methods.WHY, self.why)
        unary(methods.SET_TRAFFIC, self.set_traffic)
        bound = self._server.listen(port)
        await self._server.start()
        self._housekeeping = asyncio.create_task(self._housekeep())
        return f"{self._host}:{bound}"

    async def close(self) -> None:
        """Ends every watch and the server."""
        self._end_timer()
        tasks = [*self._tasks, *(task for _, task in self._watches.values())]
        if self._housekeeping is not None:
            tasks.append(self._housekeeping)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.stop()
        self._end_timer()
        await self._client.close()
        if self._recorder is not None:
            self._recorder.close()

    # ---- calls --------------------------------------------------------------------------------------------------

    async def reserve(self, message: Reserve) -> Plan:
        """Pending until there is room; losing the call takes the request out of the queue."""
        self._note(message)
        self._admission.reserve(message, self._now())
        future: asyncio.Future[Plan] = asyncio.get_running_loop().create_future()
        self._plans[message.request_id] = future
        try:
            self._dispatch()
            return await future
        except asyncio.CancelledError:
            if self._plans.get(message.request_id) is future:
                self._finish(Finish(message.request_id, message.attempt))
            raise
        finally:
            if self._plans.get(message.request_id) is future:
                del self._plans[message.request_id]

    async def progress(self, message: Progress) -> Acknowledged:
        """Prefill of a request is over."""
        self._note(message)
        self._admission.progress(message, self._now())
        self._dispatch()
        return Acknowledged()

    async def finish(self, message: Finish) -> Acknowledged:
        """A request is over."""
        self._finish(message)
        self._dispatch()
        return Acknowledged()

    async def renew(self, message: Renew) -> Acknowledged:
        """An ingress's heartbeat."""
        self._admission.reservations.renew(message.request_ids, self._now())
        return Acknowledged()

    async def register(self, message: Register) -> Registered:
        """A supervisor's heartbeat: watches the replica unless that is done already."""
        info, split = message.info, self._admission.traffic
        split.learn(message.traffic)
        known = self._watches.get(info.replica_id)
        if known is not None and known[0] == info.incarnation and not known[1].done():
            return Registered(True, split.traffic)
        if known is not None:
            known[1].cancel()
        self._watches[info.replica_id] = (info.incarnation, asyncio.create_task(self._watch(info)))
        return Registered(False, split.traffic)

    async def deregister(self, message: Deregister) -> Acknowledged:
        """A supervisor ends its replica."""
        known = self._watches.get(message.replica_id)
        if known is None or known[0] != message.incarnation:
            return Acknowledged(False)
        known[1].cancel()
        return Acknowledged()

    async def book(self, _: Empty) -> Book:
        """The replicas that take work."""
        admission = self._admission
        now = self._now()
        return Book(admission.book(now), admission.num_waiting, admission.traffic.weights, admission.can_grow(now))

    async def set_traffic(self, message: SetTraffic) -> Traffic:
        """Shares requests out anew. Raises InvalidParameter for a generation that no replica has."""
        split = self._admission.traffic
        if message.weights is None:
            return split.roll_back()
        known = {replica.info.generation for replica in self._admission.fleet}
        unknown = sorted(generation for generation in message.weights if generation not in known)
        if unknown or not any(weight > 0 for weight in message.weights.values()):
            running = ", ".join(sorted(known)) or "none"
            raise InvalidParameter(
                f"weights must name generations that run ({running}) and one must be positive",
                field=unknown[0] if unknown else "weights",
            )
        return split.change(message.weights)

    async def why(self, message: Why) -> Decisions:
        """What was decided about a request, as long as that is remembered."""
        return Decisions(self._admission.decisions.find(message.request_id))

    async def fleet(self, _: Empty) -> FleetStatus:
        """All that is known of the fleet, for people and metrics."""
        admission = self._admission
        return FleetStatus(
            self._id,
            admission.replicas(self._now()),
            admission.num_waiting,
            len(admission.reservations),
            admission.traffic.traffic,
            tuple(
                PoolSize(generation, role, target.num_replicas, target.reason)
                for generation, asked in sorted(admission.sizes.at(self._now()).items())
                for role, target in asked.items()
            ),
            admission.policy.foresight(),
        )

    def signals(self, generation: str, asked: Asked, interval_s: float) -> FleetSignals:
        """For a generation's autoscaler, which tells every `interval_s` for how many replicas it has asked."""
        now = self._now()
        self._admission.sizes.ask(generation, asked, now + MISSED_TICKS * interval_s)
        return fleet_signals(self._admission, generation, asked, now, datetime.now(UTC))

    # ---- inside -------------------------------------------------------------------------------------------------

    async def _watch(self, info: ReplicaInfo) -> None:
        """Follows one incarnation's reports; when they end it is no longer planned with, until it registers again."""
        try:
            async with aclosing(self._client.stream(info.address, methods.WATCH, Watch(self._id))) as reports:
                expected = 0
                async for report in reports:
                    if report.sequence != expected:
                        logger.warning("%s: report %d came as %d", info.replica_id, report.sequence, expected)
                        break
                    expected += 1
                    self._note(report)
                    self._admission.report(report, self._now())
                    if report.snapshot:
                        gc.freeze()  # the index, too, by now: a full collection would walk through all of its blocks
                    self._dispatch()
        except BatonError as error:
            logger.warning("replica %s is lost: %s", info.replica_id, error)
            await self._client.forget(info.address)
        finally:
            current = self._watches.get(info.replica_id)
            if current is not None and current[0] == info.incarnation:
                del self._watches[info.replica_id]
                self._note(Deregister(info.replica_id, info.incarnation))
                self._admission.replica_lost(info.replica_id)

    def _finish(self, message: Finish) -> None:
        self._note(message)
        request_id, attempt, num_output_tokens = message.request_id, message.attempt, message.num_output_tokens
        self._admission.finish(request_id, attempt, self._now(), num_output_tokens, message.pace)

    def _note(self, event: Event) -> None:
        if self._recorder is not None:
            self._recorder.note(event)

    def _dispatch(self) -> None:
        for plan in self._admission.dispatch(self._now()):
            future = self._plans.get(plan.request_id)
            self._note(plan)
            if future is not None and not future.done():
                _log(plan)
                future.set_result(plan)
            else:
                self._finish(Finish(plan.request_id, plan.attempt))
        for yielding in self._admission.take_yields():
            self._spawn(self._have_room_made(yielding))
        for copy in self._admission.take_copies():
            self._spawn(self._have_copied(copy))
        self._end_timer()
        wait_s = self._admission.take_held_until() - self._now()
        if wait_s < HOUSEKEEPING_S:
            self._next_dispatch = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._dispatch)

    def _end_timer(self) -> None:
        if self._next_dispatch is not None:
            self._next_dispatch.cancel()
            self._next_dispatch = None

    async def _have_room_made(self, yielding: Yielding) -> None:
        message = MakeRoom(yielding.request_id, yielding.attempt)
        try:
            await self._client.call(yielding.decode.address, methods.MAKE_ROOM, message, CONTROL_TIMEOUT_S)
        except BatonError as error:
            logger.info("%s did not make room: %s", yielding.decode.replica_id, error)

    async def _have_copied(self, copy: Copy) -> None:
        self._num_copies += 1
        message = TakeOver(f"{self._id}.{self._num_copies}", copy.block_hashes, copy.source)
        try:
            await self._client.call(copy.taker.address, methods.TAKE_OVER, message, COPY_TIMEOUT_S)
            logger.info("%d blocks of a busy prefix go to %s", len(copy.block_hashes), copy.taker.replica_id)
        except BatonError as error:
            logger.info("%s took no prefix over: %s", copy.taker.replica_id, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _housekeep(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for request_id, error in self._admission.expire(self._now()).items():
                future = self._plans.get(request_id)
                if future is not None and not future.done():
                    future.set_exception(error)
            self._dispatch()

    @staticmethod
    def _now() -> float:
        return time.monotonic()


def _log(plan: Plan) -> None:
    prefill = plan.prefill.replica_id if plan.prefill else "-"
    logger.info(
        "attempt %d: %s, prefill %s, decode %s, TTFT predicted %.3f s after %.3f s in the queue",
        plan.attempt,
        plan.reason,
        prefill,
        plan.decode.replica_id,
        plan.predicted_ttft_s,
        plan.queue_s,
        extra={"request_id": plan.request_id},
    )

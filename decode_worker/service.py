"""The decode role of a replica's first rank: the calls that it answers, its load, its way out."""

import asyncio
import logging
import time

from core.errors import NoReplica
from core.messages.fleet import Acknowledged
from core.messages.to_decode import (
    Abandon,
    Announce,
    Cancel,
    Commit,
    MakeRoom,
    Open,
    RenewedLeases,
    RenewLeases,
    Ticket,
)
from core.messages.to_lender import TakeOver
from core.messages.to_rank import SlabHeader
from core.messages.to_scheduler import ReplicaStatus
from core.telemetry import request_id_var
from decode_worker.handoff_tasks import HandoffTasks
from decode_worker.handoffs import Handoffs
from decode_worker.outbox import Outbox
from decode_worker.scheduler import DecodeScheduler
from decode_worker.sources import Sources
from decode_worker.steps import DecodeSteps
from kv_transfer.lease_book import LeaseBook
from rpc import methods
from rpc.server import RpcServer
from worker.drain import Held
from worker.drainer import Drainer
from worker.fetcher import Fetcher
from worker.rank_context import RankContext
from worker.samples import Samples
from worker.step_loop import StepLoop

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.5


class DecodeService:
    """Joins the books, the step loop and the tasks of handoffs; all state lives on the event loop's thread."""

    def __init__(self, context: RankContext) -> None:
        pool = context.spec.pool
        self._context = context
        self._config = context.spec.transfer
        num_parts = pool.steps_in_flight if pool.pipeline_parallel > 1 else 1
        self._scheduler = DecodeScheduler(context.block_pool, pool.max_num_seqs, pool.max_num_batched_tokens, num_parts)
        book = LeaseBook(context.info.layout.kv_groups, self._config.lease_ttl_s)
        limit = pool.max_num_seqs + pool.queue_limit
        self._handoffs = Handoffs(
            context.block_pool, context.info.layout, book, self._scheduler, limit, pool.num_at_once
        )
        self._fetcher = Fetcher(context)
        self.samples = Samples()
        self._sources = Sources(context, self._fetcher, self.samples)
        self.drainer = Drainer(self._config.rest_timeout_s, self._held, self._hand_over)
        self._outbox = Outbox(self._config.lease_ttl_s, self.drainer.changed)
        self._steps = DecodeSteps(
            self._scheduler, self._handoffs, self._outbox, self.drainer, self._hand_over, self.samples
        )
        timeline, most_in_flight = context.agent.timeline, pool.steps_in_flight
        self._loop = StepLoop(context.engine, self._steps, timeline, most_in_flight)
        self._tasks = HandoffTasks(self._handoffs, self._sources, self._outbox, timeline, self.drainer, self._loop.wake)

    def bind(self, server: RpcServer) -> None:
        """Registers this role's calls."""
        server.unary(methods.OPEN, self.open)
        server.unary(methods.CANCEL, self.cancel)
        server.unary(methods.TAKE_OVER, self.take_over)
        server.unary(methods.MAKE_ROOM, self.make_room)
        server.unary(methods.ANNOUNCE, self.announce)
        server.unary(methods.COMMIT, self.commit)
        server.unary(methods.ABANDON, self.abandon)
        server.unary(methods.RENEW_LEASES, self.renew_leases)
        server.stream(methods.TOKENS, self._outbox.stream)

    async def run(self) -> None:
        """The step loop; returns only by raising."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._housekeep())
            group.create_task(self._loop.run())
            group.create_task(self._context.tiers.run())

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a peer may fetch these blocks."""
        return any(books.may_read(header) for books in (self._fetcher, self._context.lender))

    def status(self) -> ReplicaStatus:
        """Load at this moment."""
        scheduler = self._scheduler
        return ReplicaStatus(
            num_waiting=len(self._handoffs) - len(scheduler.running),
            num_running=len(scheduler.running),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=self._context.block_pool.num_free,
            num_kv_tokens=scheduler.num_kv_tokens,
            draining=self.drainer.is_draining,
            prefill_tokens_per_s=self._steps.tokens_per_s.value,
            decode_step_s=self._steps.step_s.value,
            num_steps=self._context.engine.num_steps,
            links=self._sources.links.status(),
            tiers=self._context.tiers.statuses(),
        )

    # ---- calls --------------------------------------------------------------------------------------------------

    async def open(self, message: Open) -> Ticket:
        """Promises room; with `prefill` None the request joins the batch at once."""
        request_id_var.set(message.request_id)
        if self.drainer.is_draining and self._handoffs.find(message.request_id, message.attempt) is None:
            raise NoReplica("this decode replica is draining")
        if self._handoffs.find(message.request_id, message.attempt) is None:
            await self._context.tiers.restore(message.sequence.block_hashes)
            if message.pull_from is not None:
                name = f"{message.request_id}.{message.attempt}"
                hashes, patience_s = message.sequence.block_hashes, message.pull_patience_s
                await self._sources.borrow(name, hashes, message.pull_from, message.due_s, patience_s)
        handoff = self._handoffs.open(message, self._now())
        self._tasks.settle()
        if handoff.source is not None:
            self._tasks.prepare(handoff.source)
        lease = handoff.lease
        logger.info(
            "opened attempt %d: %d blocks shall come, %d are cached",
            lease.attempt,
            lease.num_missing,
            handoff.num_reused_blocks,
        )
        return handoff.ticket(self._context.info)

    async def cancel(self, message: Cancel) -> Acknowledged:
        """The ingress wants no more of this attempt and lower ones."""
        ended = self._handoffs.end(message.request_id, message.attempt, self._now())
        self._tasks.settle()
        return Acknowledged(ended is not None)

    async def announce(self, message: Announce) -> Acknowledged:
        """Starts to fetch at once; the answer does not wait for the bytes."""
        fetch = self._handoffs.announce(message, self._now())
        if fetch is not None:
            self._tasks.fetch(fetch)
        return Acknowledged()

    async def commit(self, message: Commit) -> Acknowledged:
        """Prefill is done; the request joins the batch when the last byte is in place."""
        self._handoffs.commit(message, self._now())
        self._tasks.settle()
        return Acknowledged()

    async def abandon(self, message: Abandon) -> Acknowledged:
        """Prefill gives the attempt up, or ended it with its first token."""
        handoff = self._handoffs.find(message.request_id, message.attempt)
        if handoff is None or handoff.lease.lease_id != message.lease_id:
            return Acknowledged(False)
        self._handoffs.end(message.request_id, message.attempt, self._now())
        self._tasks.settle()
        return Acknowledged()

    async def take_over(self, message: TakeOver) -> Acknowledged:
        """Copies a prefix that many requests begin with; answered when it is here, or will not come."""
        if self.drainer.is_draining:
            return Acknowledged(False)
        await self._sources.borrow(message.name, message.block_hashes, message.source, 0.0)
        self.drainer.changed()
        return Acknowledged()

    async def make_room(self, message: MakeRoom) -> Acknowledged:
        """A batch request that is in the way goes on elsewhere, or later."""
        handoff = self._handoffs.find(message.request_id, message.attempt)
        if handoff is None:
            return Acknowledged(False)
        self._tasks.resume_elsewhere(handoff)
        self._tasks.settle()
        return Acknowledged()

    async def renew_leases(self, message: RenewLeases) -> RenewedLeases:
        """An ingress's heartbeat."""
        return RenewedLeases(self._handoffs.renew(message.request_ids, self._now()))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _held(self) -> Held:
        """Leases; fetches, loans, releases and token events on their way, the step in flight."""
        moving = len(self._context.lender) + len(self._context.tiers) + self._sources.num_loans + len(self._tasks)
        return Held(len(self._handoffs), moving + self._outbox.num_undelivered + self._loop.in_flight)

    def _hand_over(self) -> None:
        """Every ingress plans the rest of its requests anew, with the tokens shown so far."""
        for handoff in self._handoffs:
            self._tasks.resume_elsewhere(handoff)
        self._tasks.settle()

    async def _housekeep(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for handoff in self._handoffs.end_expired(self._now()):
                logger.warning("lease of %s expired: nobody renewed it", handoff.request_id)
            self._context.lender.give_back_expired(self._now())
            self._handoffs.stop_waiting(self._now(), self._config.control_timeout_s)
            self._outbox.forget_absent(self._now())
            self._tasks.settle()

    @staticmethod
    def _now() -> float:
        return time.monotonic()

"""The decode role of a replica's first rank: leases, fetches, the running batch, token streams."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from core.errors import BatonError, NoReplica, TransferFailed
from core.messages.fleet import Acknowledged, ReplicaInfo
from core.messages.to_decode import (
    Abandon,
    Announce,
    Cancel,
    Commit,
    Open,
    Phases,
    RenewedLeases,
    RenewLeases,
    Ticket,
    TokenEvent,
)
from core.messages.to_prefill import Release
from core.messages.to_rank import SlabHeader, TimelineEvent
from core.messages.to_scheduler import ReplicaStatus
from core.telemetry import request_id_var
from decode_worker.handoffs import Fetch, Handoff, Handoffs
from decode_worker.links import Links
from decode_worker.outbox import Outbox
from decode_worker.scheduler import DecodeScheduler, DecodeStep, Outcome
from engine.batch import StepResult
from kv_transfer.lease_book import LeaseBook
from rpc import methods
from rpc.server import RpcServer
from worker.borrower import Borrower
from worker.drain import Held
from worker.drainer import Drainer
from worker.fetcher import BlockOrder, Fetcher
from worker.rank_context import RankContext
from worker.rates import MovingAverage
from worker.step_loop import StepLoop

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.5


class DecodeService:
    """Thin shell around Handoffs and DecodeScheduler; all state lives on the event loop's thread."""

    def __init__(self, context: RankContext) -> None:
        pool = context.spec.pool
        self._context = context
        self._config = context.spec.transfer
        self._scheduler = DecodeScheduler(context.block_pool, pool.max_num_seqs, pool.max_num_batched_tokens)
        book = LeaseBook(context.info.layout.num_layers, self._config.lease_ttl_s)
        limit = pool.max_num_seqs + pool.queue_limit
        self._handoffs = Handoffs(context.block_pool, context.spec.block_size, book, self._scheduler, limit)
        self._fetcher = Fetcher(context)
        self._borrower = Borrower(context, self._fetcher)
        self.drainer = Drainer(self._config.rest_timeout_s, self._held, self._hand_over)
        self._outbox = Outbox(self._config.lease_ttl_s, self.drainer.changed)
        self._loop = StepLoop(context.engine, self, context.agent.timeline)
        self._tasks: set[asyncio.Task[None]] = set()
        self._links = Links()
        self._step_s = MovingAverage()
        self._tokens_per_s = MovingAverage()

    def bind(self, server: RpcServer) -> None:
        """Registers this role's calls."""
        server.unary(methods.OPEN, self.open)
        server.unary(methods.CANCEL, self.cancel)
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
            prefill_tokens_per_s=self._tokens_per_s.value,
            decode_step_s=self._step_s.value,
            num_steps=self._context.engine.num_steps,
            links=self._links.status(),
        )

    # ---- calls --------------------------------------------------------------------------------------------------

    async def open(self, message: Open) -> Ticket:
        """Promises room; with `prefill` None the request joins the batch at once."""
        request_id_var.set(message.request_id)
        if self.drainer.is_draining and self._handoffs.find(message.request_id, message.attempt) is None:
            raise NoReplica("this decode replica is draining")
        if message.pull_from is not None and self._handoffs.find(message.request_id, message.attempt) is None:
            name = f"{message.request_id}.{message.attempt}"
            fetched = await self._borrower.borrow(name, message.sequence, message.pull_from, message.due_s)
            if fetched is not None:
                self._links.add(message.pull_from.replica_id, fetched)
        handoff = self._handoffs.open(message, self._now())
        self._settle()
        if handoff.source is not None:
            self._spawn(self._prepare(handoff.source))
        lease = handoff.lease
        logger.info(
            "opened attempt %d: %d blocks, %d cached", lease.attempt, lease.num_blocks, lease.first_missing_block
        )
        return Ticket(
            message.request_id,
            message.attempt,
            lease.lease_id,
            self._context.info,
            lease.first_missing_block,
            lease.num_blocks,
        )

    async def cancel(self, message: Cancel) -> Acknowledged:
        """The ingress wants no more of this attempt and lower ones."""
        ended = self._handoffs.end(message.request_id, message.attempt, self._now())
        self._settle()
        return Acknowledged(ended is not None)

    async def announce(self, message: Announce) -> Acknowledged:
        """Starts to fetch at once; the answer does not wait for the bytes."""
        fetch = self._handoffs.announce(message, self._now())
        if fetch is not None:
            self._spawn(self._fetch(fetch))
        return Acknowledged()

    async def commit(self, message: Commit) -> Acknowledged:
        """Prefill is done; the request joins the batch when the last byte is in place."""
        self._handoffs.commit(message, self._now())
        self._settle()
        return Acknowledged()

    async def abandon(self, message: Abandon) -> Acknowledged:
        """Prefill gives the attempt up, or ended it with its first token."""
        handoff = self._handoffs.find(message.request_id, message.attempt)
        if handoff is None or handoff.lease.lease_id != message.lease_id:
            return Acknowledged(False)
        self._handoffs.end(message.request_id, message.attempt, self._now())
        self._settle()
        return Acknowledged()

    async def renew_leases(self, message: RenewLeases) -> RenewedLeases:
        """An ingress's heartbeat."""
        return RenewedLeases(self._handoffs.renew(message.request_ids, self._now()))

    # ---- the step loop's side -----------------------------------------------------------------------------------

    def next_step(self) -> DecodeStep | None:
        """Schedules; requests that had to make room are told to resume elsewhere."""
        step = self._scheduler.schedule()
        self._deliver(self._scheduler.take_preempted())
        return step

    def layers_done(self, step: DecodeStep, first_layer: int, num_layers: int) -> None:
        """Nothing leaves decode layer by layer."""

    def step_done(self, step: DecodeStep, result: StepResult, seconds: float) -> None:
        """Sends the step's tokens, one frame per ingress."""
        if all(advance.num_tokens == 1 for advance in step.advances):
            self._step_s.add(seconds)
        else:
            self._tokens_per_s.add(step.batch.num_tokens / seconds)
        self._deliver(self._scheduler.finish(step, result))
        self.drainer.changed()

    def step_failed(self, step: DecodeStep) -> None:
        """The engine is gone: every request here is to be resumed elsewhere."""
        self._scheduler.abort(step)
        self._hand_over()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _held(self) -> Held:
        """Leases; fetches, loans, releases and token events on their way, the step in flight."""
        moving = len(self._context.lender) + len(self._borrower) + len(self._tasks)
        return Held(len(self._handoffs), moving + self._outbox.num_undelivered + self._loop.in_flight)

    def _hand_over(self) -> None:
        """Every ingress plans the rest of its requests anew, with the tokens shown so far."""
        for handoff in self._handoffs:
            self._tell_to_resume(handoff)
            self._handoffs.end(handoff.request_id, handoff.message.attempt, self._now())
        self._settle()

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            job = outcome.job
            handoff = self._handoffs.find(job.request_id, job.attempt)
            if handoff is None:
                continue
            is_first = handoff.times.first_token_at == 0
            if is_first:
                handoff.times.first_token_at = self._now()
            event = TokenEvent(
                job.request_id,
                job.attempt,
                outcome.first_index,
                (outcome.token_id,) if outcome.token_id is not None else (),
                (outcome.logprobs,) if outcome.logprobs is not None else (),
                outcome.finish_reason,
                num_cached_tokens=job.sequence.num_cached if is_first and handoff.source is None else None,
                phases=_phases(handoff) if is_first else None,
            )
            self._outbox.put(handoff.message.ingress_id, event, self._now())
            if outcome.finish_reason is not None:
                extra = {"request_id": job.request_id}
                logger.info("%s after %d tokens", outcome.finish_reason, job.sequence.num_outputs, extra=extra)
                self._handoffs.end(job.request_id, job.attempt, self._now())
                self.drainer.changed()

    async def _fetch(self, fetch: Fetch) -> None:
        request_id_var.set(fetch.handoff.request_id)
        handoff, number = fetch.handoff, fetch.announce.number
        try:
            fetched = await self._fetcher.fetch(_order(fetch))
        except BatonError as error:
            logger.warning("fetch %d of %s failed: %s", number, handoff.request_id, error)
            if isinstance(error, TransferFailed) and error.field == "digest":
                self._links.corrupt(fetch.announce.source.replica_id)
            if self._handoffs.fetch_failed(handoff, number, self._now()):
                self._tell_to_resume(handoff)
        else:
            self._handoffs.fetched(handoff, number, fetched, self._now())
            self._links.add(fetch.announce.source.replica_id, fetched)
        self._settle()

    async def _borrow_owed(self, handoff: Handoff) -> None:
        """Blocks that were to come with another request's transfer, which ended before."""
        assert handoff.source is not None
        sequence, (*_, (_, last)) = handoff.message.sequence, handoff.owed
        wanted = replace(sequence, block_hashes=sequence.block_hashes[: sequence.block_hashes.index(last) + 1])
        name = f"{handoff.request_id}.{handoff.message.attempt}.owed"
        fetched = await self._borrower.borrow(name, wanted, handoff.source, handoff.message.due_s)
        if fetched is not None:
            self._links.add(handoff.source.replica_id, fetched)
        if not self._handoffs.claim(handoff, self._now()) and self._handoffs.find(*handoff.key) is handoff:
            self._tell_to_resume(handoff)
            self._handoffs.end(*handoff.key, self._now())
        self._settle()

    async def _prepare(self, source: ReplicaInfo) -> None:
        """Channels are made while prefill computes; those that stand already cost nothing."""
        try:
            await self._fetcher.prepare(source)
        except BatonError as error:
            logger.info("channels from %s are not ready yet: %s", source.replica_id, error)

    def _tell_to_resume(self, handoff: Handoff) -> None:
        event = TokenEvent(
            handoff.request_id, handoff.message.attempt, handoff.sequence.num_outputs, (), finish_reason="resume"
        )
        self._outbox.put(handoff.message.ingress_id, event, self._now())

    def _settle(self) -> None:
        """After any change: releases what prefill may free, tells ingresses what joined, wakes loop and drain."""
        for handoff in self._handoffs.take_owed():
            self._spawn(self._borrow_owed(handoff))
        for handoff in self._handoffs.take_releasable():
            self._spawn(self._release(handoff))
        for handoff in self._handoffs.take_joined():
            joined = TokenEvent(handoff.request_id, handoff.message.attempt, handoff.sequence.num_outputs, ())
            self._outbox.put(handoff.message.ingress_id, joined, self._now())
            if handoff.source is not None:
                self._context.agent.timeline.add(_whole(handoff, handoff.source))
        self._loop.wake()
        self.drainer.changed()

    async def _release(self, handoff: Handoff) -> None:
        assert handoff.source is not None
        message = Release(handoff.request_id, handoff.message.attempt)
        try:
            await self._context.client.call(
                handoff.source.address, methods.RELEASE, message, self._config.control_timeout_s
            )
        except BatonError as error:
            logger.info("prefill %s did not take a release: %s", handoff.source.replica_id, error)

    async def _housekeep(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for handoff in self._handoffs.end_expired(self._now()):
                logger.warning("lease of %s expired: nobody renewed it", handoff.request_id)
            self._context.lender.give_back_expired(self._now())
            self._handoffs.stop_waiting(self._now(), self._config.control_timeout_s)
            self._outbox.forget_absent(self._now())
            self._settle()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._rested)

    def _rested(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.drainer.changed()

    @staticmethod
    def _now() -> float:
        return time.monotonic()


def _order(fetch: Fetch) -> BlockOrder:
    announce = fetch.announce
    return BlockOrder(
        announce.request_id,
        announce.attempt,
        announce.lease_id,
        announce.source,
        announce.first_layer,
        announce.num_layers,
        announce.first_block,
        announce.source_blocks,
        fetch.destination_blocks,
        fetch.due_s,
    )


def _whole(handoff: Handoff, source: ReplicaInfo) -> TimelineEvent:
    """From Open to the moment that decode may go on."""
    times = handoff.times
    return TimelineEvent(
        handoff.request_id,
        handoff.message.attempt,
        "handoff",
        source.address,
        times.opened_at,
        times.completed_at,
        handoff.transfer_bytes,
    )


def _phases(handoff: Handoff) -> Phases:
    """Where the time went from Open to the first token that decode computed."""
    times, lease = handoff.times, handoff.lease
    if handoff.source is None:
        return Phases(prefill_s=times.first_token_at - times.opened_at, num_blocks_reused=handoff.num_reused_blocks)
    return Phases(
        transfer_s=times.completed_at - (times.first_announced_at or times.completed_at),
        fetching_s=handoff.fetching_s,
        exposed_transfer_s=max(0.0, times.completed_at - times.committed_at),
        first_decode_s=times.first_token_at - times.completed_at,
        transfer_bytes=handoff.transfer_bytes,
        num_blocks_received=lease.num_blocks - lease.first_missing_block,
        num_blocks_reused=handoff.num_reused_blocks,
    )

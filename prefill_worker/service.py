"""The prefill role of a replica's first rank: takes prompts, announces their blocks to decode, answers first tokens."""

import asyncio
import logging
import time
from functools import partial
from typing import Any

from core.errors import BatonError, NoReplica, PeerLost, RequestTimeout, StaleMessage
from core.messages.fleet import Acknowledged, ReplicaInfo
from core.messages.to_decode import Abandon, Announce, Cancel, Commit
from core.messages.to_lender import TakeOver
from core.messages.to_prefill import FirstToken, Prefill, Release
from core.messages.to_rank import SlabHeader
from core.messages.to_scheduler import ReplicaStatus
from core.telemetry import request_id_var
from engine.batch import StepResult
from kv_transfer.share_book import ShareBook
from prefill_worker.deliveries import Deliveries, Outgoing
from prefill_worker.scheduler import Prefilled, PrefillScheduler, PrefillStep
from rpc import methods
from rpc.server import RpcServer
from worker.borrower import Borrower, Hashes
from worker.drain import Held
from worker.drainer import Drainer
from worker.fetcher import Fetcher
from worker.patience import wait_for_at_most
from worker.rank_context import RankContext
from worker.rates import MovingAverage
from worker.samples import Samples
from worker.step_loop import StepLoop

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.5

_METHODS: dict[type, methods.Unary[Any, Acknowledged]] = {
    Announce: methods.ANNOUNCE,
    Commit: methods.COMMIT,
    Abandon: methods.ABANDON,
}


class PrefillService:
    """Thin shell around PrefillScheduler and ShareBook; all state lives on the event loop's thread."""

    def __init__(self, context: RankContext) -> None:
        pool = context.spec.pool
        self._context = context
        self._config = context.spec.transfer
        self._scheduler = PrefillScheduler(
            context.block_pool,
            context.info.layout,
            pool.max_num_seqs,
            pool.max_num_batched_tokens,
            pool.queue_limit,
            pool.steps_in_flight,
        )
        shares = ShareBook(context.info.layout.block_size, self._config.rest_timeout_s)
        self._deliveries = Deliveries(context.info, context.block_pool, self._scheduler, shares)
        self._loop = StepLoop(context.engine, self, context.agent.timeline, pool.steps_in_flight)
        self._fetcher = Fetcher(context)
        self._borrower = Borrower(context, self._fetcher)
        self._answers: dict[tuple[str, int], asyncio.Future[FirstToken]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pulls: set[asyncio.Task[None]] = set()
        self._tokens_per_s = MovingAverage()
        self.samples = Samples()
        self.drainer = Drainer(self._config.rest_timeout_s, self._held, self._hand_over)

    def bind(self, server: RpcServer) -> None:
        """Registers this role's calls."""
        server.unary(methods.PREFILL, self.prefill)
        server.unary(methods.TAKE_OVER, self.take_over)
        server.unary(methods.CANCEL, self.cancel)
        server.unary(methods.RELEASE, self.release)

    async def run(self) -> None:
        """The step loop; returns only by raising."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._housekeep())
            group.create_task(self._loop.run())
            group.create_task(self._context.tiers.run())

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a peer may fetch these blocks, or a sibling rank may."""
        return any(books.may_read(header) for books in (self._deliveries, self._context.lender, self._fetcher))

    def status(self) -> ReplicaStatus:
        """Load at this moment."""
        scheduler, pool = self._scheduler, self._context.block_pool
        return ReplicaStatus(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=pool.num_free,
            num_kv_tokens=0,
            draining=self.drainer.is_draining,
            prefill_tokens_per_s=self._tokens_per_s.value,
            decode_step_s=0.0,
            num_steps=self._context.engine.num_steps,
            tiers=self._context.tiers.statuses(),
        )

    # ---- calls --------------------------------------------------------------------------------------------------

    async def prefill(self, message: Prefill) -> FirstToken:
        """Answers with the first token. Losing the call cancels the prefill at the next step."""
        request_id_var.set(message.request_id)
        key = (message.request_id, message.attempt)
        known = self._answers.get(key)
        if known is not None:
            return await asyncio.shield(known)
        if self.drainer.is_draining:
            raise NoReplica("this prefill replica is draining")
        answer: asyncio.Future[FirstToken] = asyncio.get_running_loop().create_future()
        self._answers[key] = answer
        try:
            async with asyncio.timeout(message.timeout_s):
                await self._context.tiers.restore(message.sequence.block_hashes)
                if message.pull_from is not None:
                    await wait_for_at_most(message.pull_patience_s, self._borrow(message), self._pulls)
                self._deliveries.accept(message, self._now())
                self._loop.wake()
                return await answer
        except TimeoutError as error:
            raise RequestTimeout(f"prefill took longer than {message.timeout_s:.1f} s") from error
        finally:
            del self._answers[key]
            self._cancel(*key)
            self.drainer.changed()

    async def take_over(self, message: TakeOver) -> Acknowledged:
        """Copies a prefix that many requests begin with; answered when it is here, or will not come."""
        if self.drainer.is_draining:
            return Acknowledged(False)
        await self._bring(message.name, message.block_hashes, message.source)
        self.drainer.changed()
        return Acknowledged()

    async def cancel(self, message: Cancel) -> Acknowledged:
        """The ingress wants no more of this attempt and lower ones."""
        return Acknowledged(self._cancel(message.request_id, message.attempt))

    async def release(self, message: Release) -> Acknowledged:
        """Decode reads no more of this attempt: its blocks lose their reader, and nobody waits for the rest."""
        self._end(self._deliveries.release(message.request_id, message.attempt, self._now()))
        self._loop.wake()
        self.drainer.changed()
        return Acknowledged()

    # ---- the step loop's side -----------------------------------------------------------------------------------

    def next_step(self) -> PrefillStep | None:
        """Schedules; what newly started requests found cached is announced at once."""
        step, outgoing = self._deliveries.next_step(self._now())
        self._tell(outgoing)
        return step

    def layers_done(self, step: PrefillStep, first_layer: int, num_layers: int) -> None:
        """Announces the blocks that this step makes final, for these layers."""
        self._tell(self._deliveries.layers_done(step, first_layer, num_layers, self._now()))

    def step_done(self, step: PrefillStep, result: StepResult, seconds: float) -> None:
        """Answers the prompts that are complete."""
        self._tokens_per_s.add(step.batch.num_tokens / seconds)
        self.samples.add_step(step.batch, seconds)
        for prefilled, closing in self._deliveries.step_done(step, result, self._now()):
            self._answer(prefilled)
            self._tell([closing])
        self.drainer.changed()

    def step_failed(self, step: PrefillStep) -> None:
        """The engine is gone; so are all requests here."""
        self._scheduler.abort(step)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerLost("the prefill engine failed"))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _held(self) -> Held:
        """Prompts without an answer; blocks that others still read, messages to decode, the step in flight."""
        moving = len(self._deliveries) + len(self._context.lender) + len(self._borrower) + len(self._tasks)
        return Held(len(self._answers), moving + len(self._context.tiers) + self._loop.in_flight)

    def _hand_over(self) -> None:
        """The ingress plans these prompts anew, and decode lets their attempts go."""
        for key in self._answers:
            self._fail(key, NoReplica("this prefill replica is draining"))

    def _answer(self, prefilled: Prefilled) -> None:
        job = prefilled.job
        answer = self._answers.get(job.key)
        if answer is None or answer.done():
            return
        times = job.started_at - job.arrived_at, self._now() - job.started_at
        cached = job.sequence.num_cached
        extra = {"request_id": job.key[0]}
        logger.info("prefilled %d tokens, %d of them cached", job.sequence.num_prompt, cached, extra=extra)
        answer.set_result(FirstToken(prefilled.token_id, prefilled.logprobs, prefilled.finish_reason, cached, *times))

    async def _borrow(self, message: Prefill) -> None:
        assert message.pull_from is not None
        await self._bring(f"{message.request_id}.{message.attempt}", message.sequence.block_hashes, message.pull_from)

    async def _bring(self, name: str, hashes: Hashes, source: ReplicaInfo) -> None:
        fetched = await self._borrower.borrow(name, hashes, source, 0.0)
        if fetched is not None:
            self.samples.add_transfer(source.replica_id, fetched.num_bytes, fetched.seconds)

    def _fail(self, key: tuple[str, int], error: BatonError) -> None:
        answer = self._answers.get(key)
        if answer is not None and not answer.done():
            answer.set_exception(error)

    def _cancel(self, request_id: str, attempt: int) -> bool:
        dropped = self._deliveries.cancel(request_id, attempt, self._now())
        self._end(dropped)
        return bool(dropped)

    def _end(self, dropped: list[Outgoing]) -> None:
        """Jobs that were dropped: whoever waits is told, and decode."""
        for outgoing in dropped:
            request_id, attempt = outgoing.job.key
            self._fail(outgoing.job.key, StaleMessage(f"attempt {attempt} of request {request_id} was cancelled"))
        self._tell(dropped)

    def _tell(self, outgoing: list[Outgoing]) -> None:
        for one in outgoing:
            task = asyncio.create_task(self._tell_decode(one))
            self._tasks.add(task)
            task.add_done_callback(self._told)

    def _told(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.drainer.changed()

    async def _tell_decode(self, outgoing: Outgoing) -> None:
        """A decode replica that refuses or is lost ends the attempt; the ingress plans anew."""
        job, message = outgoing.job, outgoing.message
        method = _METHODS[type(message)]
        decode = job.message.ticket.decode
        try:
            await self._deliver(decode.address, method, message)
        except BatonError as error:
            logger.info("%s of %s failed: %s", method.name, job.key, error)
            if not isinstance(message, Abandon):
                self._fail(job.key, PeerLost(f"decode replica {decode.replica_id}: {error}", field="decode"))
                self._cancel(*job.key)

    async def _deliver(
        self, address: str, method: methods.Unary[Any, Acknowledged], message: Announce | Commit | Abandon
    ) -> None:
        """Once more when nobody knows whether it arrived: decode ignores what it has heard before."""
        call = partial(self._context.client.call, address, method, message, self._config.control_timeout_s)
        try:
            await call()
        except PeerLost:
            await call()

    async def _housekeep(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for share in self._deliveries.release_expired(self._now()):
                logger.warning("decode never released attempt %d of %s", share.attempt, share.request_id)
                self.drainer.changed()
            if self._context.lender.give_back_expired(self._now()):
                self.drainer.changed()

    @staticmethod
    def _now() -> float:
        return time.monotonic()

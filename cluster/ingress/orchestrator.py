"""The life of a request: reserve, open on decode, prefill, stream; and its second life when a replica fails.

generate = attempts until one finishes; each takes up where the shown tokens end
attempt  = reservation( subscription( lease( prefill -> first token; decode -> the rest )))
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from cluster.ingress.generation import FleetHealth, Generation, GenerationEvent, GenerationReport
from cluster.ingress.scheduler_client import SchedulerClient
from cluster.ingress.token_streams import Subscription, TokenStreams
from core.block_hash import chain_seed, hash_blocks
from core.config import TransferConfig
from core.errors import BatonError, NoReplica, Overloaded, PeerError, PeerLost, RequestTimeout, Unavailable
from core.messages.to_decode import Cancel, Open, Phases, Sequence, Ticket, TokenEvent
from core.messages.to_prefill import FirstToken, Prefill
from core.messages.to_scheduler import FleetStatus, Plan, Reserve, Traffic
from rpc.client import RpcClient
from rpc.methods import CANCEL, OPEN, PREFILL

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0


class _NoRoom(Exception):
    """The planned replica is full, drains or preempts: nobody failed, another plan is due."""


@dataclass
class _Progress:
    """What the client of a generation has been given so far."""

    generation: Generation
    deadline: float
    shown: list[int] = field(default_factory=list)
    avoid: set[str] = field(default_factory=set)
    num_resumes: int = 0
    phases: Phases | None = None  # of the first attempt that decoded
    finished: bool = False
    fleet_generation: str = ""  # whose weights made the shown tokens


@dataclass(frozen=True)
class Fleet:
    """The constants that every request of an ingress shares."""

    ingress_id: str
    block_size: int
    tenant_salt: str
    max_attempts: int


class Orchestrator:
    """The production Backend of the HTTP layer."""

    def __init__(
        self,
        fleet: Fleet,
        config: TransferConfig,
        client: RpcClient,
        scheduler: SchedulerClient,
        streams: TokenStreams,
    ) -> None:
        self._fleet = fleet
        self._config = config
        self._client = client
        self._scheduler = scheduler
        self._streams = streams
        self._tasks: set[asyncio.Task[None]] = set()

    async def health(self) -> FleetHealth:
        """From the scheduler's last address book."""
        return self._scheduler.health()

    async def fleet(self) -> FleetStatus:
        """From the scheduler. Raises PeerLost while it is away."""
        return await self._scheduler.fleet()

    async def set_traffic(self, weights: dict[str, float] | None) -> Traffic:
        """At the scheduler. Raises PeerLost while it is away, InvalidParameter."""
        return await self._scheduler.set_traffic(weights)

    async def generate(self, generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        """See generation.Backend. Raises RequestTimeout, Overloaded, NoReplica, PeerError after the last attempt.

        Attempts end with `max_attempts` failures that no token came between.
        """
        progress = _Progress(generation, asyncio.get_running_loop().time() + generation.timeout_s)
        num_failures = 0  # in a row without a token: a request that ends its replicas fails, a long one outlives many
        for attempt in count():
            try:
                async with aclosing(self._attempt(progress, attempt)) as events:
                    async for event in events:
                        progress.shown += event.token_ids
                        if event.token_ids:
                            num_failures = 0
                        yield event
                return
            except PeerError as error:
                num_failures += 1
                if not error.retryable or num_failures >= self._fleet.max_attempts:
                    raise
                logger.warning("attempt %d of %s failed: %s", attempt, generation.request_id, error)
                progress.num_resumes += 1
                await asyncio.sleep(RETRY_PAUSE_S * (num_failures - 1))
            except _NoRoom as refusal:
                logger.info("attempt %d of %s has no room: %s", attempt, generation.request_id, refusal)
                progress.num_resumes += 1
                await asyncio.sleep(RETRY_PAUSE_S)  # longer than a report takes to tell the scheduler
            except Unavailable as error:
                if attempt == 0 or isinstance(error, RequestTimeout):
                    raise  # a request that was never taken is refused at once; one under way waits for capacity
                progress.avoid.clear()  # those that are left may be the avoided ones
                await asyncio.sleep(min(error.retry_after_s or RETRY_PAUSE_S, LONGEST_PAUSE_S))

    async def _attempt(self, progress: _Progress, attempt: int) -> AsyncGenerator[GenerationEvent, None]:
        """One plan from start to end. Raises PeerError when it must be planned anew."""
        sequence = self._sequence(progress)
        request_id = progress.generation.request_id
        async with (
            self._scheduler.reservation(self._reserve(progress, sequence, attempt)) as plan,
            self._streams.subscribe(plan.decode, request_id, attempt) as subscription,
            self._lease(progress, plan, sequence, attempt, subscription) as ticket,
        ):
            progress.fleet_generation = plan.decode.generation
            first: FirstToken | None = None
            if plan.prefill is not None:
                first = await self._first_token(progress, plan, sequence, ticket, subscription)
                self._scheduler.progress(request_id)
                progress.finished = first.finish_reason is not None
                yield self._first_event(progress, plan, first)
                if first.finish_reason is not None:
                    return
            async with aclosing(self._decoded(progress, plan, first, subscription)) as events:
                async for event in events:
                    yield event

    async def _first_token(
        self, progress: _Progress, plan: Plan, sequence: Sequence, ticket: Ticket, subscription: Subscription
    ) -> FirstToken:
        """Prefill's answer, unless decode ends the attempt before."""
        assert plan.prefill is not None
        remaining_s = self._remaining(progress)
        message = Prefill(ticket.request_id, ticket.attempt, sequence, ticket, remaining_s)
        call = asyncio.create_task(self._client.call(plan.prefill.address, PREFILL, message, remaining_s))
        broken = asyncio.create_task(subscription.broken.wait())
        try:
            await asyncio.wait({call, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise PeerLost(f"decode replica {plan.decode.replica_id} ended the request", field="decode")
            return await call
        except PeerError as error:
            failed = plan.decode if error.field == "decode" else plan.prefill
            progress.avoid.add(failed.replica_id)
            raise
        except (NoReplica, Overloaded) as error:
            raise _NoRoom(f"{plan.prefill.replica_id} took no prompt: {error}") from error
        finally:
            for task in (call, broken):
                task.cancel()
            await asyncio.gather(call, broken, return_exceptions=True)

    async def _decoded(
        self, progress: _Progress, plan: Plan, first: FirstToken | None, subscription: Subscription
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Tokens from decode's stream, from the first that the client has not seen."""
        joined = plan.prefill is None
        while True:
            wait_s = self._remaining(progress) if joined else self._config.rest_timeout_s
            try:
                async with asyncio.timeout(wait_s):
                    event = await subscription.next()
            except TimeoutError as error:
                if joined:
                    raise RequestTimeout(f"not finished within {progress.generation.timeout_s:.1f} s") from error
                progress.avoid.add(plan.decode.replica_id)
                raise PeerLost("the handoff did not complete in time") from error
            except PeerLost:
                progress.avoid.add(plan.decode.replica_id)
                raise
            self._require_going_on(progress, plan, event)
            joined = True
            if not event.token_ids:
                continue
            if event.first_index > len(progress.shown):
                raise PeerLost(f"tokens {len(progress.shown)} to {event.first_index} were lost on the way")
            progress.finished = event.finish_reason is not None
            yield self._decode_event(progress, plan, first, event)
            if event.finish_reason is not None:
                return

    def _require_going_on(self, progress: _Progress, plan: Plan, event: TokenEvent) -> None:
        if event.finish_reason == "resume":
            progress.avoid.add(plan.decode.replica_id)
            raise _NoRoom(f"decode replica {plan.decode.replica_id} handed the request back")

    def _first_event(self, progress: _Progress, plan: Plan, first: FirstToken) -> GenerationEvent:
        is_last = first.finish_reason is not None
        if is_last:
            progress.phases = Phases(queue_s=plan.queue_s + first.queue_s, prefill_s=first.prefill_s)
        return GenerationEvent(
            (first.token_id,),
            (first.logprobs,) if first.logprobs is not None else (),
            first.finish_reason,
            None if progress.shown else first.num_cached_tokens,
            progress.phases,
            progress.num_resumes,
            self._report(progress, plan) if is_last else None,
        )

    def _decode_event(
        self, progress: _Progress, plan: Plan, first: FirstToken | None, event: TokenEvent
    ) -> GenerationEvent:
        if plan.prefill is None and event.phases is not None:  # the attempt's first
            self._scheduler.progress(event.request_id)
        known = len(progress.shown) - event.first_index
        phases = None
        if event.phases is not None and progress.phases is None:
            phases = replace(event.phases, queue_s=plan.queue_s + (first.queue_s if first else 0.0))
            if first is not None:
                phases = replace(phases, prefill_s=first.prefill_s)
            progress.phases = phases
        return GenerationEvent(
            event.token_ids[known:],
            event.logprobs[known:],
            event.finish_reason,
            None if progress.shown else event.num_cached_tokens,
            phases,
            progress.num_resumes,
            self._report(progress, plan) if event.finish_reason is not None else None,
        )

    @staticmethod
    def _report(progress: _Progress, plan: Plan) -> GenerationReport:
        prefill = plan.prefill.replica_id if plan.prefill else None
        return GenerationReport(plan.reason, prefill, plan.decode.replica_id, progress.num_resumes, progress.phases)

    @asynccontextmanager
    async def _lease(
        self, progress: _Progress, plan: Plan, sequence: Sequence, attempt: int, subscription: Subscription
    ) -> AsyncIterator[Ticket]:
        """Room on decode; leaving the block in any way ends the attempt there, and on prefill through it."""
        request_id = progress.generation.request_id
        message = Open(request_id, attempt, self._fleet.ingress_id, sequence, plan.prefill, self._remaining(progress))
        try:
            try:
                ticket = await self._client.call(plan.decode.address, OPEN, message, self._config.control_timeout_s)
            except (NoReplica, Overloaded) as error:
                raise _NoRoom(f"{plan.decode.replica_id} did not open: {error}") from error
            except BatonError as error:
                progress.avoid.add(plan.decode.replica_id)
                if error.retryable:
                    raise PeerLost(f"{plan.decode.replica_id} did not open: {error}") from error
                raise
            subscription.opened = True
            yield ticket
        finally:
            if not progress.finished:
                self._spawn(self._cancel(plan, Cancel(request_id, attempt)))

    async def _cancel(self, plan: Plan, message: Cancel) -> None:
        """Idempotent on both sides; a finished request is simply unknown there."""
        for replica in filter(None, (plan.decode, plan.prefill)):
            try:
                await self._client.call(replica.address, CANCEL, message, self._config.control_timeout_s)
            except BatonError as error:
                logger.info("cancel did not reach %s: %s", replica.replica_id, error)

    def _reserve(self, progress: _Progress, sequence: Sequence, attempt: int) -> Reserve:
        generation = progress.generation
        return Reserve(
            generation.request_id,
            attempt,
            self._fleet.ingress_id,
            len(sequence.token_ids),
            generation.sampling.max_tokens - len(progress.shown),
            sequence.block_hashes,
            self._remaining(progress),
            tuple(sorted(progress.avoid)),
            generation.placement,
            progress.fleet_generation if progress.shown else "",
        )

    def _sequence(self, progress: _Progress) -> Sequence:
        token_ids = (*progress.generation.prompt_token_ids, *progress.shown)
        salt = self._fleet.tenant_salt
        hashes = hash_blocks(token_ids, self._fleet.block_size, salt)
        return Sequence(token_ids, hashes, progress.generation.sampling, chain_seed(salt), len(progress.shown))

    @staticmethod
    def _remaining(progress: _Progress) -> float:
        remaining_s = progress.deadline - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            raise RequestTimeout(f"not finished within {progress.generation.timeout_s:.1f} s")
        return remaining_s

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

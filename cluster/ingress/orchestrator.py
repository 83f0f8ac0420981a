"""The life of a request: reserve, open on decode, prefill, stream; and its second life when a replica fails.

generate = attempts until one finishes; each takes up where the shown tokens end
attempt  = reservation( subscription( lease( prefill -> first token; decode -> the rest )))
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from cluster.ingress.attempt import Attempt, NoRoom, Progress
from cluster.ingress.generation import FleetHealth, Generation, GenerationEvent
from cluster.ingress.pacer import Pacer
from cluster.ingress.scheduler_client import SchedulerClient
from cluster.ingress.token_streams import Subscription, TokenStreams
from core.block_hash import chain_seed, hash_blocks, salt_of
from core.config import TransferConfig
from core.errors import BatonError, NoReplica, Overloaded, PeerError, PeerLost, RequestTimeout, Unavailable
from core.messages.to_decode import Cancel, Open, Sequence, Ticket
from core.messages.to_prefill import Prefill
from core.messages.to_scheduler import Decisions, FleetStatus, Plan, Reserve, Traffic
from rpc.client import RpcClient
from rpc.methods import CANCEL, OPEN

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True)
class Fleet:
    """The constants that every request of an ingress shares."""

    ingress_id: str
    block_size: int
    tenant_salt: str
    max_attempts: int
    tenants_share_prefixes: bool = False

    def salt(self, tenant: str) -> str:
        """What seeds the hashes of a tenant's blocks."""
        return self.tenant_salt if self.tenants_share_prefixes else salt_of(self.tenant_salt, tenant)


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

    async def why(self, request_id: str) -> Decisions:
        """From the scheduler. Raises PeerLost while it is away."""
        return await self._scheduler.why(request_id)

    async def set_traffic(self, weights: dict[str, float] | None) -> Traffic:
        """At the scheduler. Raises PeerLost while it is away, InvalidParameter."""
        return await self._scheduler.set_traffic(weights)

    async def generate(self, generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        """See generation.Backend. Raises RequestTimeout, Overloaded, NoReplica, PeerError after the last attempt.

        Attempts end with `max_attempts` failures that no progress came between.
        """
        progress = Progress(generation, asyncio.get_running_loop().time() + generation.timeout_s)
        num_failures = 0  # in a row without progress: a request that ends its replicas fails, a long one outlives many
        for attempt in count():
            num_shown = len(progress.shown)
            try:
                async with aclosing(self._attempt(progress, attempt)) as events:
                    async for event in events:
                        progress.shown += event.token_ids
                        if len(progress.shown) > num_shown + 1:  # more than prefill's: decode works
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
            except NoRoom as refusal:
                logger.info("attempt %d of %s has no room: %s", attempt, generation.request_id, refusal)
                progress.num_resumes += 1
                await asyncio.sleep(RETRY_PAUSE_S)  # longer than a report takes to tell the scheduler
            except Unavailable as error:
                if attempt == 0 or isinstance(error, RequestTimeout):
                    raise  # a request that was never taken is refused at once; one under way waits for capacity
                progress.avoid.clear()  # those that are left may be the avoided ones
                await asyncio.sleep(min(error.retry_after_s or RETRY_PAUSE_S, LONGEST_PAUSE_S))

    async def _attempt(self, progress: Progress, attempt: int) -> AsyncGenerator[GenerationEvent, None]:
        """One plan from start to end. Raises PeerError when it must be planned anew."""
        sequence = self._sequence(progress)
        request_id, progress.pacer = progress.generation.request_id, Pacer()
        reserve, finish = self._reserve(progress, sequence, attempt), partial(progress.finish, attempt)
        async with (
            self._scheduler.reservation(reserve, finish) as plan,
            self._streams.subscribe(plan.decode, request_id, attempt) as subscription,
            self._lease(progress, plan, sequence, attempt, subscription) as ticket,
        ):
            progress.fleet_generation, progress.pacer = plan.decode.generation, subscription.pacer
            prompt = None
            if plan.prefill is not None:
                pull = plan.pull_from, plan.pull_patience_s
                prompt = Prefill(request_id, attempt, sequence, ticket, progress.remaining_s, *pull)
            on_first_token = partial(self._scheduler.progress, request_id)
            under_way = Attempt(progress, plan, subscription, self._client, self._config, on_first_token)
            async with aclosing(under_way.events(prompt)) as events:
                async for event in events:
                    yield event

    @asynccontextmanager
    async def _lease(
        self, progress: Progress, plan: Plan, sequence: Sequence, attempt: int, subscription: Subscription
    ) -> AsyncIterator[Ticket]:
        """Room on decode; leaving the block in any way ends the attempt there, and on prefill through it."""
        request_id = progress.generation.request_id
        due_s = progress.due_s(progress.generation.standing.ttft_slo_s or self._config.ttft_slo_s)
        pull_from = plan.pull_from if plan.prefill is None else None
        message = Open(
            request_id,
            attempt,
            self._fleet.ingress_id,
            sequence,
            plan.prefill,
            progress.remaining_s,
            due_s,
            pull_from,
            plan.pull_patience_s,
        )
        timeout_s = self._config.control_timeout_s + (self._config.data_timeout_s if pull_from is not None else 0.0)
        try:
            try:
                ticket = await self._client.call(plan.decode.address, OPEN, message, timeout_s)
            except (NoReplica, Overloaded) as error:
                raise NoRoom(f"{plan.decode.replica_id} did not open: {error}") from error
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

    def _reserve(self, progress: Progress, sequence: Sequence, attempt: int) -> Reserve:
        generation, standing = progress.generation, progress.generation.standing
        return Reserve(
            generation.request_id,
            attempt,
            self._fleet.ingress_id,
            len(sequence.token_ids),
            generation.sampling.max_tokens - len(progress.shown),
            sequence.block_hashes,
            progress.remaining_s,
            tuple(sorted(progress.avoid)),
            generation.placement,
            progress.fleet_generation if progress.shown else "",
            standing.tenant,
            standing.slo_class,
            standing.ttft_slo_s,
            standing.itl_slo_s,
            standing.priority,
            num_shown=len(progress.shown),
        )

    def _sequence(self, progress: Progress) -> Sequence:
        token_ids = (*progress.generation.prompt_token_ids, *progress.shown)
        salt = self._fleet.salt(progress.generation.standing.tenant)
        hashes = hash_blocks(token_ids, self._fleet.block_size, salt)
        return Sequence(token_ids, hashes, progress.generation.sampling, chain_seed(salt), len(progress.shown))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

"""One attempt at a request: prefill's first token, then decode's, from the first that the client has not seen."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from cluster.ingress.generation import Generation, GenerationEvent, GenerationReport
from cluster.ingress.pacer import Pacer
from cluster.ingress.token_streams import Subscription
from core.config import TransferConfig
from core.errors import NoReplica, Overloaded, PeerError, PeerLost, RequestTimeout
from core.messages.to_decode import Phases, TokenEvent
from core.messages.to_prefill import FirstToken, Prefill
from core.messages.to_scheduler import Finish, Plan
from rpc.client import RpcClient
from rpc.methods import PREFILL


class NoRoom(Exception):
    """The planned replica is full, drains or preempts: nobody failed, another plan is due."""


@dataclass
class Progress:
    """What the client of a generation has been given so far, over all attempts."""

    generation: Generation
    deadline: float  # of the event loop's clock
    shown: list[int] = field(default_factory=list)
    avoid: set[str] = field(default_factory=set)  # replicas that failed the request
    num_resumes: int = 0
    phases: Phases | None = None  # of the first attempt that decoded
    finished: bool = False
    fleet_generation: str = ""  # whose weights made the shown tokens
    pacer: Pacer = field(default_factory=Pacer)  # of the attempt under way

    def due_s(self, slo_s: float) -> float:
        """Until the client, who came `slo_s` before that, should have its first tokens; 0 when that has passed."""
        arrived_at = self.deadline - self.generation.timeout_s
        return max(0.0, arrived_at + slo_s - asyncio.get_running_loop().time())

    def finish(self, attempt: int) -> Finish:
        """For the scheduler, of the attempt under way: all tokens, if the request has come to its end."""
        num_output_tokens = len(self.shown) if self.finished else None
        return Finish(self.generation.request_id, attempt, num_output_tokens, self.pacer.pace())

    @property
    def remaining_s(self) -> float:
        """Until the deadline. Raises RequestTimeout when it has passed."""
        remaining_s = self.deadline - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            raise RequestTimeout(f"not finished within {self.generation.timeout_s:.1f} s")
        return remaining_s


class Attempt:
    """A plan under way, with room on decode and its events subscribed to."""

    def __init__(
        self,
        progress: Progress,
        plan: Plan,
        subscription: Subscription,
        client: RpcClient,
        config: TransferConfig,
        on_first_token: Callable[[int | None], None],
    ) -> None:
        """`on_first_token` is called when the attempt's prefill is over, wherever it ran, with what it found cached."""
        self._progress = progress
        self._plan = plan
        self._subscription = subscription
        self._client = client
        self._config = config
        self._on_first_token = on_first_token
        self._first: FirstToken | None = None  # prefill's

    async def events(self, prompt: Prefill | None) -> AsyncGenerator[GenerationEvent, None]:
        """What the client gets; `prompt` goes to the planned prefill replica.

        Raises PeerError and NoRoom when the request must be planned anew, RequestTimeout at its deadline.
        """
        if prompt is not None:
            self._first = await self._first_token(prompt)
            self._subscription.prefilled()
            self._on_first_token(self._first.num_cached_tokens)
            self._progress.finished = self._first.finish_reason is not None
            yield self._first_event(self._first)
            if self._progress.finished:
                return
        async with aclosing(self._decoded()) as events:
            async for event in events:
                yield event

    async def _first_token(self, prompt: Prefill) -> FirstToken:
        """Prefill's answer, unless decode ends the attempt before."""
        prefill, decode = self._plan.prefill, self._plan.decode
        assert prefill is not None
        call = asyncio.create_task(self._client.call(prefill.address, PREFILL, prompt, prompt.timeout_s))
        broken = asyncio.create_task(self._subscription.broken.wait())
        try:
            await asyncio.wait({call, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise PeerLost(f"decode replica {decode.replica_id} ended the request", field="decode")
            return await call
        except PeerError as error:
            failed = decode if error.field == "decode" else prefill
            self._progress.avoid.add(failed.replica_id)
            raise
        except (NoReplica, Overloaded) as error:
            raise NoRoom(f"{prefill.replica_id} took no prompt: {error}") from error
        finally:
            for task in (call, broken):
                task.cancel()
            await asyncio.gather(call, broken, return_exceptions=True)

    async def _decoded(self) -> AsyncGenerator[GenerationEvent, None]:
        """Tokens from decode's stream. Until it has joined the batch, only the handoff's own time is given."""
        progress, replica_id = self._progress, self._plan.decode.replica_id
        joined = self._plan.prefill is None
        while True:
            wait_s = progress.remaining_s if joined else self._config.rest_timeout_s
            try:
                async with asyncio.timeout(wait_s):
                    event = await self._subscription.next()
            except TimeoutError as error:
                if joined:
                    raise RequestTimeout(f"not finished within {progress.generation.timeout_s:.1f} s") from error
                progress.avoid.add(replica_id)
                raise PeerLost("the handoff did not complete in time") from error
            except PeerLost:
                progress.avoid.add(replica_id)
                raise
            if event.finish_reason == "resume":
                progress.avoid.add(replica_id)
                raise NoRoom(f"decode replica {replica_id} handed the request back")
            joined = True
            if not event.token_ids:
                continue
            if event.first_index > len(progress.shown):
                raise PeerLost(f"tokens {len(progress.shown)} to {event.first_index} were lost on the way")
            progress.finished = event.finish_reason is not None
            yield self._decode_event(event)
            if progress.finished:
                return

    def _first_event(self, first: FirstToken) -> GenerationEvent:
        progress, is_last = self._progress, first.finish_reason is not None
        if is_last:
            progress.phases = Phases(queue_s=self._plan.queue_s + first.queue_s, prefill_s=first.prefill_s)
        return GenerationEvent(
            (first.token_id,),
            (first.logprobs,) if first.logprobs is not None else (),
            first.finish_reason,
            None if progress.shown else first.num_cached_tokens,
            progress.phases,
            progress.num_resumes,
            self._report() if is_last else None,
        )

    def _decode_event(self, event: TokenEvent) -> GenerationEvent:
        progress, first = self._progress, self._first
        if first is None and event.phases is not None:  # the attempt's first event
            self._on_first_token(event.num_cached_tokens)
        known = len(progress.shown) - event.first_index
        phases = None
        if event.phases is not None and progress.phases is None:
            phases = replace(event.phases, queue_s=self._plan.queue_s + (first.queue_s if first else 0.0))
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
            self._report() if event.finish_reason is not None else None,
        )

    def _report(self) -> GenerationReport:
        plan, progress = self._plan, self._progress
        prefill = plan.prefill.replica_id if plan.prefill else None
        return GenerationReport(plan.reason, prefill, plan.decode.replica_id, progress.num_resumes, progress.phases)

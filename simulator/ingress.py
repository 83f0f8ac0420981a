"""An ingress: each request from arrival to end, the twin of cluster/ingress/orchestrator.py and attempt.py. Pure.

attempt = plan -> room on decode -> prefill's first token -> decode joins -> the rest; a failed one is planned anew
"""

from collections.abc import Callable, Iterator
from functools import partial

from core.errors import BatonError, NoReplica, Overloaded, PeerError, PeerLost, RequestTimeout
from core.messages.to_decode import Cancel, Open, Phases, Ticket
from core.messages.to_prefill import FirstToken, Prefill
from core.messages.to_scheduler import Plan, Reserve
from simulator.events import TIMER
from simulator.fleet_spec import FleetSpec
from simulator.host import World
from simulator.lease_heartbeat import LeaseHeartbeat
from simulator.peers import Peers
from simulator.request import Request, RequestState
from simulator.retries import NoRoom, pause_before_next
from simulator.scheduler_line import SchedulerLine


class Ingress:
    """Belongs to one fleet. `over` takes requests that have ended, with their outcome: stop, length, or why not."""

    def __init__(
        self, world: World, number: int, peers: Peers, spec: FleetSpec, over: Callable[[Request, str], None]
    ) -> None:
        self.number = number
        self.alive = True
        self._world = world
        self._peers = peers
        self._spec = spec
        self._over = over
        self._requests: dict[str, Request] = {}
        self.line: SchedulerLine

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def start(self, line: SchedulerLine) -> None:
        """Begins to follow the scheduler, and to renew leases."""
        self.line = line
        line.start()
        LeaseHeartbeat(self._world, self, self._peers, self._spec.transfer.lease_ttl_s / 3).start()

    def arrive(self, request: Request) -> None:
        """A client asks."""
        self._requests[request.request_id] = request
        self._world.queue.at(request.deadline, TIMER, self.number, self._too_late, request.request_id)
        self._plan(request)

    # ---- what it hears ------------------------------------------------------------------------------------------

    def joined(self, request_id: str, attempt: int) -> None:
        """Decode has it in its batch."""
        request = self._current(request_id, attempt)
        if request is not None and request.state is RequestState.HANDOVER:
            request.to(RequestState.DECODING)

    def first_token_here(self, request_id: str, attempt: int, num_cached: int) -> None:
        """Decode has computed the prompt by itself."""
        request = self._current(request_id, attempt)
        if request is not None:
            if request.num_cached is None:
                request.num_cached = num_cached
            self.line.progress(request_id, num_cached)

    def finished(self, request_id: str, attempt: int, reason: str, phases: Phases) -> None:
        """Decode's last token."""
        request = self._current(request_id, attempt)
        if request is not None:
            request.num_transfer_bytes += phases.transfer_bytes
            self._end_attempt(request, finished=True)
            self._end(request, reason)

    def resume(self, request_id: str, attempt: int) -> None:
        """Decode hands it back."""
        request = self._current(request_id, attempt)
        if request is None or request.plan is None:
            return
        decode_id = request.plan.decode.replica_id
        request.avoid.add(decode_id)
        if request.state is RequestState.PREFILLING:
            self._fail(request, PeerLost(f"decode replica {decode_id} ended the request", field="decode"))
        else:
            self._fail(request, NoRoom(f"decode replica {decode_id} handed the request back"))

    def decode_lost(self, replica_id: str, incarnation: int) -> None:
        """Its token stream broke."""
        for request in list(self._requests.values()):
            plan = request.plan
            if plan is not None and (plan.decode.replica_id, plan.decode.incarnation) == (replica_id, incarnation):
                request.avoid.add(replica_id)
                self._fail(request, PeerLost(f"decode replica {replica_id} is lost", field="decode"))

    def forgotten(self, request_id: str, attempt: int) -> None:
        """Decode knows nothing of it any more."""
        request = self._current(request_id, attempt)
        if request is not None and request.plan is not None:
            request.avoid.add(request.plan.decode.replica_id)
            self._fail(request, PeerLost("decode has forgotten the request", field="decode"))

    # ---- an attempt ---------------------------------------------------------------------------------------------

    def _plan(self, request: Request) -> None:
        if request.state is RequestState.OVER:
            return
        request.to(RequestState.PLANNING)
        request.attempt += 1
        sequence = request.sequence(self._spec.block_size)
        asked = self._spec.clients.max_tokens or len(request.output)
        message = Reserve(
            request.request_id,
            request.attempt,
            str(self.number),
            len(sequence.token_ids),
            max(1, asked - len(request.shown)),
            sequence.block_hashes,
            request.deadline - self._now,
            tuple(sorted(request.avoid)),
            "auto",
            request.generation if request.shown else "",
            request.salt,
            request.slo_class,
            num_shown=len(request.shown),
        )
        attempt = request.attempt
        self.line.reserve(message, partial(self._planned, request), partial(self._failed, request, attempt))

    def _planned(self, request: Request, plan: Plan) -> None:
        if request.attempt != plan.attempt or request.state is not RequestState.PLANNING:
            return  # it left the queue; the Finish that followed ends its reservation
        request.plan = request.last_plan = plan
        request.queued_s += plan.queue_s
        request.generation = plan.decode.generation
        request.to(RequestState.OPENING)
        self.line.hold(plan)
        pull_from = plan.pull_from if plan.prefill is None else None
        due_s = max(0.0, request.arrived_at + self._spec.transfer.ttft_slo_s - self._now)
        sequence, remaining_s = request.sequence(self._spec.block_size), request.deadline - self._now
        message = Open(
            request.request_id,
            plan.attempt,
            str(self.number),
            sequence,
            plan.prefill,
            remaining_s,
            due_s,
            pull_from,
            plan.pull_patience_s,
        )
        decode, failed = self._peers.decode(plan.decode), partial(self._not_opened, request, plan.attempt)
        opened = partial(self._opened, request, message)
        wire = self._world.wire
        wire.tell(self.number, decode.host, decode.open, message, request.times, opened, failed, failed=failed)

    def _opened(self, request: Request, message: Open, ticket: Ticket) -> None:
        plan = request.plan
        if request.attempt != ticket.attempt or request.state is not RequestState.OPENING or plan is None:
            return
        request.opened = True
        if plan.prefill is None:
            request.to(RequestState.DECODING)
            return
        request.to(RequestState.PREFILLING)
        remaining_s = request.deadline - self._now
        pull = plan.pull_from, plan.pull_patience_s
        prompt = Prefill(request.request_id, ticket.attempt, message.sequence, ticket, remaining_s, *pull)
        prefill, failed = self._peers.prefill(plan.prefill), partial(self._not_prefilled, request, ticket.attempt)
        reply = partial(self._first_token, request, ticket.attempt)
        self._world.wire.tell(self.number, prefill.host, prefill.prefill, prompt, reply, failed, failed=failed)

    def _first_token(self, request: Request, attempt: int, first: FirstToken) -> None:
        if request.attempt != attempt or request.state is not RequestState.PREFILLING:
            return
        if request.num_cached is None:
            request.num_cached = first.num_cached_tokens
        request.times.append(self._now)
        self.line.progress(request.request_id, first.num_cached_tokens)
        request.to(RequestState.HANDOVER)
        if first.finish_reason is not None:
            self._end_attempt(request, finished=True)
            self._end(request, first.finish_reason)
            return
        self._later(self._spec.transfer.rest_timeout_s, self._handover_late, request.request_id, attempt)

    # ---- what goes wrong ----------------------------------------------------------------------------------------

    def _failed(self, request: Request, attempt: int, error: BatonError) -> None:
        if request.attempt == attempt and request.state is RequestState.PLANNING:
            self._fail(request, error)

    def _not_opened(self, request: Request, attempt: int, error: BatonError) -> None:
        if request.attempt != attempt or request.state is not RequestState.OPENING:
            return
        assert request.plan is not None
        if isinstance(error, NoReplica | Overloaded):
            self._fail(request, NoRoom(str(error)))
            return
        request.avoid.add(request.plan.decode.replica_id)
        self._fail(request, PeerLost(f"did not open: {error}") if error.retryable else error)

    def _not_prefilled(self, request: Request, attempt: int, error: BatonError) -> None:
        if request.attempt != attempt or request.state is not RequestState.PREFILLING:
            return
        plan = request.plan
        assert plan is not None and plan.prefill is not None
        if isinstance(error, NoReplica | Overloaded):
            self._fail(request, NoRoom(str(error)))
            return
        if isinstance(error, PeerError):
            failed = plan.decode if error.field == "decode" else plan.prefill
            request.avoid.add(failed.replica_id)
        self._fail(request, error)

    def _handover_late(self, request_id: str, attempt: int) -> None:
        request = self._current(request_id, attempt)
        if request is not None and request.state is RequestState.HANDOVER:
            assert request.plan is not None
            request.avoid.add(request.plan.decode.replica_id)
            self._fail(request, PeerLost("the handoff did not complete in time"))

    def _too_late(self, request_id: str) -> None:
        if (request := self._requests.get(request_id)) is not None:
            self._fail(request, RequestTimeout("not finished in time"))

    def _fail(self, request: Request, error: BatonError | NoRoom) -> None:
        """Another attempt, or the end."""
        if request.state is not RequestState.PAUSED:
            num_new = self._end_attempt(request, finished=False)
            if num_new > 1:  # more than prefill's: decode works
                request.num_failures = 0
        pause_s = pause_before_next(request, error, self._spec.max_attempts)
        if pause_s is None:
            self._end(request, type(error).__name__)
            return
        request.to(RequestState.PAUSED)
        self._later(pause_s, self._plan, request)

    def _end_attempt(self, request: Request, *, finished: bool) -> int:
        """Leaves the reservation, the subscription and the lease; how many tokens the attempt brought."""
        plan, attempt = request.plan, request.attempt
        if plan is not None:
            self._peers.decode(plan.decode).advance()  # so that all tokens that have been sent are known of
        num_new = request.end_attempt(self._now)
        if plan is not None and not finished:
            cancel, wire = Cancel(request.request_id, attempt), self._world.wire
            decode = self._peers.decode(plan.decode)
            wire.tell(self.number, decode.host, decode.cancel, cancel)
            if plan.prefill is not None:
                prefill = self._peers.prefill(plan.prefill)
                wire.tell(self.number, prefill.host, prefill.cancel, cancel)
        self.line.release(request.request_id, attempt, plan, len(request.shown) if finished else None)
        request.plan, request.opened, request.was_unknown = None, False, False
        return num_new

    def _end(self, request: Request, outcome: str) -> None:
        request.to(RequestState.OVER)
        del self._requests[request.request_id]
        self._over(request, outcome)

    # ---- inside -------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> float:
        return self._world.queue.now

    def _current(self, request_id: str, attempt: int) -> Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def _later(self, seconds: float, action: Callable[..., None], *args: object) -> None:
        self._world.queue.at(self._now + seconds, TIMER, self.number, action, *args)

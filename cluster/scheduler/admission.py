"""The global scheduler: pending reservations in, plans out; the one place where requests wait. Pure.

reserve --> waiting --dispatch--> reserved --progress--> decoding --finish--> gone
               |  queue full: Overloaded      +------- expiry, replica lost ----^
               +- deadline: Overloaded with Retry-After
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from cluster.scheduler.asked_sizes import AskedSizes
from cluster.scheduler.decision import Decision, DecisionMaker
from cluster.scheduler.fleet_view import FleetView, ReplicaView
from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.traffic import TrafficSplit
from cluster.scheduler.workload_meter import WorkloadMeter
from core.config import SchedulerConfig
from core.errors import BatonError, NoReplica, Overloaded, PromptTooLong
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import Plan, ReplicaState, Report, Reserve
from kv_transfer.tombstones import Tombstones


@dataclass
class Reservation:
    """A dispatched request, until it finishes or nobody renews it."""

    request_id: str
    attempt: int
    prefill_id: str | None
    decode_id: str
    generation: str
    expires_at: float
    decoding_since: float | None = None


@dataclass(frozen=True)
class _Waiting:
    request: Reserve
    since: float


@dataclass(frozen=True)
class _Generations:
    """Where requests can go at one moment."""

    decodes: Mapping[str, list[ReplicaView]]  # by generation, those without any left out
    longest: Mapping[str, int]  # tokens that one of them can hold, by generation
    asleep: tuple[str, ...]  # generations with traffic that were scaled to zero


class Admission:
    """Queue, reservations and the fleet's state; dispatch in order of arrival."""

    def __init__(self, config: SchedulerConfig, rate_window_s: float = 30.0, first_generation: str = "") -> None:
        self.fleet = FleetView(config.replica_timeout_s)
        self.index = PrefixIndex()
        self.traffic = TrafficSplit(first_generation)
        self.sizes = AskedSizes()
        self._workloads: defaultdict[str, WorkloadMeter] = defaultdict(partial(WorkloadMeter, rate_window_s))
        self._config = config
        self._decision_maker = DecisionMaker(config)
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._reservations: dict[str, Reservation] = {}
        self._tombstones = Tombstones()

    @property
    def num_waiting(self) -> int:
        """Requests without a plan."""
        return len(self._waiting)

    def can_grow(self, now: float) -> bool:
        """An autoscaler is at work: requests wait in the queue for replicas that it brings, from none too."""
        return bool(self.sizes.at(now))

    def waiting_for(self, generation: str, now: float) -> list[Reserve]:
        """Requests without a plan that a generation shall answer."""
        generations = self._generations(now)
        requests = (waiting.request for waiting in self._waiting.values())
        return [request for request in requests if self._generation_for(request, generations) == generation]

    def workload(self, generation: str) -> WorkloadMeter:
        """What comes to a generation."""
        return self._workloads[generation]

    @property
    def max_decode_kv_usage(self) -> float:
        """The share of a decode replica's blocks beyond which it gets no new request."""
        return self._config.max_decode_kv_usage

    @property
    def num_reserved(self) -> int:
        """Requests with a plan that have not finished."""
        return len(self._reservations)

    def report(self, report: Report, now: float) -> None:
        """Takes a replica's report in."""
        replica_id = report.info.replica_id
        is_new = self.fleet.update(report.info, report.status, now)
        if is_new or report.snapshot:
            self.index.remove_replica(replica_id)
        self.index.remove(replica_id, report.removed)
        self.index.store(replica_id, report.stored)

    def replica_lost(self, replica_id: str) -> None:
        """Its process cannot be reached, or it deregistered; its reservations are moot."""
        self.fleet.remove(replica_id)
        self.index.remove_replica(replica_id)

    def reserve(self, request: Reserve, now: float) -> None:
        """Queues a request; a repeated one, or a new attempt, replaces the old.

        It waits for a decode replica too: one may be starting, or about to register with a new scheduler.
        Raises Overloaded, PromptTooLong, and StaleMessage when its Finish came first.
        """
        self._tombstones.refuse(request.request_id, request.attempt)
        self._drop(request.request_id)
        generations = self._generations(now)
        if (too_long := _too_long(request, generations)) is not None:
            raise too_long
        if len(self._waiting) >= self._config.queue_limit:
            raise Overloaded(f"{self._config.queue_limit} requests wait already", retry_after_s=1.0)
        self._waiting[request.request_id] = _Waiting(request, now)
        if request.attempt == 0:
            self.workload(self._generation_for(request, generations)).arrived(now)

    def dispatch(self, now: float) -> list[Plan]:
        """Plans for waiting requests, oldest first, in each generation until one finds no room.

        One that avoids replicas holds nobody up: there may be room where it does not want to go.
        """
        plans = []
        generations = self._generations(now)
        decodes = generations.decodes
        full: set[str] = set()
        for waiting in list(self._waiting.values()):
            if full >= decodes.keys():
                break
            generation = self._generation_for(waiting.request, generations)
            if generation in full or generation not in decodes:
                continue
            decision = self._decide(waiting.request, decodes[generation], now)
            if decision is None:
                if not waiting.request.avoid:
                    full.add(generation)  # nobody of this generation overtakes
                continue
            del self._waiting[waiting.request.request_id]
            plans.append(self._book(waiting, decision, now))
        return plans

    def progress(self, request_id: str, now: float) -> None:
        """Its first token is out: prefill is free again, and decode's own report counts its blocks."""
        reservation = self._reservations.get(request_id)
        if reservation is None:
            return
        reservation.decoding_since = now
        for replica in self._replicas_of(reservation):
            replica.prefill_tokens.pop(request_id, None)
            if request_id in replica.decode_requests:
                replica.decode_requests[request_id] = 0

    def finish(self, request_id: str, attempt: int, now: float) -> None:
        """Ends an attempt in any state, also before its Reserve came; idempotent."""
        self._tombstones.bury(request_id, attempt, now)
        waiting, reservation = self._waiting.get(request_id), self._reservations.get(request_id)
        if reservation and reservation.attempt <= attempt and reservation.decoding_since is not None:
            self.workload(reservation.generation).decoded(now - reservation.decoding_since)
        if (waiting and waiting.request.attempt <= attempt) or (reservation and reservation.attempt <= attempt):
            self._drop(request_id)

    def renew(self, request_ids: tuple[str, ...], now: float) -> None:
        """Keeps reservations alive; unknown ones are ignored (a restarted scheduler knows none)."""
        for request_id in request_ids:
            if request_id in self._reservations:
                self._reservations[request_id].expires_at = now + self._config.reservation_ttl_s

    def expire(self, now: float) -> dict[str, BatonError]:
        """Ends reservations that nobody renewed; returns the requests that will get no plan, and why.

        They waited too long, or no replica that has come since can hold them.
        """
        for reservation in [r for r in self._reservations.values() if r.expires_at <= now]:
            self._drop(reservation.request_id)
        generations = self._generations(now)
        has_decode = self.can_grow(now) or bool(generations.decodes)
        late: dict[str, BatonError] = {}
        for waiting in self._waiting.values():
            waited_s, limit_s = now - waiting.since, min(waiting.request.timeout_s, self._config.queue_timeout_s)
            if waited_s >= limit_s:
                error = Overloaded(f"no capacity within {limit_s:.0f} s", retry_after_s=limit_s / 2)
                late[waiting.request.request_id] = error
            elif (too_long := _too_long(waiting.request, generations)) is not None:
                late[waiting.request.request_id] = too_long
            elif not has_decode and waited_s >= self._config.no_replica_timeout_s:
                late[waiting.request.request_id] = NoReplica("no decode replica is ready", retry_after_s=2.0)
        for request_id in late:
            del self._waiting[request_id]
        return late

    def book(self, now: float) -> tuple[ReplicaInfo, ...]:
        """Replicas that take new work."""
        return tuple(replica.info for role in Role for replica in self.fleet.usable(role, now))

    def replicas(self, now: float) -> tuple[ReplicaState, ...]:
        """Every replica that is known, also those that take no work."""
        return tuple(ReplicaState(r.info, r.status, now - r.seen_at) for r in self.fleet)

    def _drop(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        reservation = self._reservations.pop(request_id, None)
        if reservation is not None:
            for replica in self._replicas_of(reservation):
                replica.prefill_tokens.pop(request_id, None)
                replica.decode_requests.pop(request_id, None)

    def _generations(self, now: float) -> _Generations:
        decodes: dict[str, list[ReplicaView]] = {}
        for decode in self.fleet.usable(Role.DECODE, now):
            decodes.setdefault(decode.info.generation, []).append(decode)
        longest = {g: max(decode.info.max_model_len for decode in of_one) for g, of_one in decodes.items()}
        weights, sizes = self.traffic.weights, self.sizes.at(now).items()
        asleep = [g for g, asked in sizes if weights.get(g, 0.0) > 0 and asked[Role.DECODE].num_replicas == 0]
        return _Generations(decodes, longest, tuple(asleep))

    def _generation_for(self, request: Reserve, generations: _Generations) -> str:
        """Tokens that were shown bind a request to the weights that made them, as long as those are served.

        Another one goes where it fits: it would wait in vain elsewhere, and all others behind it. A generation that
        sleeps counts too: who waits for it makes its autoscaler bring a replica.
        """
        if not generations.decodes:
            return self.traffic.choose(request.request_id, self.traffic.weights)
        if request.generation and request.generation in generations.decodes:
            return request.generation
        num_tokens = request.num_tokens + request.max_new_tokens
        fitting = [g for g, longest in generations.longest.items() if num_tokens <= longest]
        return self.traffic.choose(request.request_id, {*(fitting or generations.decodes), *generations.asleep})

    def _decide(self, request: Reserve, decodes: list[ReplicaView], now: float) -> Decision | None:
        prefills = self.fleet.usable(Role.PREFILL, now)
        return self._decision_maker.decide(request, prefills, decodes, self.index.match(request.block_hashes))

    def _book(self, waiting: _Waiting, decision: Decision, now: float) -> Plan:
        request = waiting.request
        prefill, decode = decision.prefill, decision.decode
        self.workload(decode.info.generation).planned(request.num_tokens, decision.num_uncached_tokens)
        (prefill or decode).prefill_tokens[request.request_id] = decision.num_uncached_tokens
        decode.decode_requests[request.request_id] = decision.num_decode_blocks
        self._reservations[request.request_id] = Reservation(
            request.request_id,
            request.attempt,
            prefill.info.replica_id if prefill else None,
            decode.info.replica_id,
            decode.info.generation,
            now + self._config.reservation_ttl_s,
        )
        return Plan(
            request.request_id,
            request.attempt,
            prefill.info if prefill else None,
            decode.info,
            now - waiting.since,
            decision.predicted_ttft_s,
            decision.reason,
            decision.lender.info if decision.lender else None,
        )

    def _replicas_of(self, reservation: Reservation) -> list[ReplicaView]:
        ids = (reservation.prefill_id, reservation.decode_id)
        return [replica for i in ids if i is not None and (replica := self.fleet.get(i)) is not None]


def _too_long(request: Reserve, generations: _Generations) -> PromptTooLong | None:
    """The error when no decode replica can ever hold a request."""
    limit = max(generations.longest.values(), default=None)
    if limit is None or request.num_tokens + request.max_new_tokens <= limit:
        return None
    return PromptTooLong(
        f"{request.num_tokens} prompt and {request.max_new_tokens} output tokens exceed the {limit} tokens "
        "that a decode replica's KV cache holds",
        field="max_tokens",
    )

"""The global scheduler: pending reservations in, plans out; the one place where requests wait. Pure.

reserve --> waiting --dispatch--> reserved --progress--> decoding --finish--> gone
               |  queue full: Overloaded      +------- expiry, replica lost ----^
               +- deadline: Overloaded with Retry-After
"""

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from functools import partial

from cluster.scheduler.asked_sizes import AskedSizes
from cluster.scheduler.candidate import Decision
from cluster.scheduler.decision import DecisionMaker
from cluster.scheduler.fleet_view import FleetView
from cluster.scheduler.generations import Generations
from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.policy import Choices, Policy
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservations
from cluster.scheduler.traffic import TrafficSplit
from cluster.scheduler.workload_meter import WorkloadMeter
from core.config import SchedulerConfig
from core.errors import BatonError, NoReplica, Overloaded
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import Plan, Progress, ReplicaState, Report, Reserve
from kv_transfer.tombstones import Tombstones


@dataclass(frozen=True)
class _Waiting:
    request: Reserve
    since: float


class Admission:
    """The queue, dispatched in order of arrival to what reservations leave of the fleet."""

    def __init__(
        self,
        config: SchedulerConfig,
        rate_window_s: float = 30.0,
        first_generation: str = "",
        policy: Policy | None = None,
    ) -> None:
        """`policy` chooses the replicas; None takes the production one."""
        self.fleet = FleetView(config.replica_timeout_s)
        self.index = PrefixIndex()
        self.traffic = TrafficSplit(first_generation)
        self.sizes = AskedSizes()
        self.reservations = Reservations(self.fleet, config.reservation_ttl_s)
        self._workloads: defaultdict[str, WorkloadMeter] = defaultdict(partial(WorkloadMeter, rate_window_s))
        self._config = config
        self.policy: Policy = policy or DecisionMaker(config)
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
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
        return [request for request in requests if generations.answering(request) == generation]

    def workload(self, generation: str) -> WorkloadMeter:
        """What comes to a generation."""
        return self._workloads[generation]

    @property
    def max_decode_kv_usage(self) -> float:
        """The share of a decode replica's blocks beyond which it gets no new request."""
        return self._config.max_decode_kv_usage

    def report(self, report: Report, now: float) -> None:
        """Takes a replica's report in."""
        replica_id = report.info.replica_id
        is_new = self.fleet.update(report.info, report.status, now)
        if is_new or report.snapshot:
            self.index.remove_replica(replica_id)
        self.index.remove(replica_id, report.removed)
        self.index.store(replica_id, report.stored, report.info.layout.reaches, report.tiers)
        if (replica := self.fleet.get(replica_id)) is not None:
            self.policy.reported(replica, report, now)

    def replica_lost(self, replica_id: str) -> None:
        """Its process cannot be reached, or it deregistered; its reservations are moot."""
        self.policy.lost(replica_id)
        self.fleet.remove(replica_id)
        self.index.remove_replica(replica_id)

    def reserve(self, request: Reserve, now: float) -> None:
        """Queues a request; a repeated one, or a new attempt, replaces the old.

        It waits for a decode replica too: one may be starting, or about to register with a new scheduler.
        Raises Overloaded, PromptTooLong, and StaleMessage when its Finish came first.
        """
        self._tombstones.refuse(request.request_id, request.attempt)
        self._drop(request.request_id, now)
        generations = self._generations(now)
        if (too_long := generations.too_long(request)) is not None:
            raise too_long
        if len(self._waiting) >= self._config.queue_limit:
            raise Overloaded(f"{self._config.queue_limit} requests wait already", retry_after_s=1.0)
        self._waiting[request.request_id] = _Waiting(request, now)
        if request.attempt == 0:
            self.workload(generations.answering(request)).arrived(now)

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
            generation = generations.answering(waiting.request)
            if generation in full or generation not in decodes:
                continue
            decision = self._decide(waiting.request, decodes[generation].replicas, now)
            if decision is None:
                if not waiting.request.avoid:
                    full.add(generation)  # nobody of this generation overtakes
                continue
            del self._waiting[waiting.request.request_id]
            plans.append(self._book(waiting, decision, now))
        return plans

    def progress(self, message: Progress, now: float) -> None:
        """A request's first token is out."""
        if (reservation := self.reservations.progress(message.request_id, now)) is not None:
            self.policy.first_token(reservation, message.num_cached_tokens, now)

    def finish(self, request_id: str, attempt: int, now: float, num_output_tokens: int | None = None) -> None:
        """Ends an attempt in any state, also before its Reserve came; idempotent.

        `num_output_tokens` of one that came to its end, over all its attempts.
        """
        self._tombstones.bury(request_id, attempt, now)
        waiting, reservation = self._waiting.get(request_id), self.reservations.find(request_id)
        if reservation and reservation.attempt <= attempt and reservation.decoding_since is not None:
            self.workload(reservation.generation).decoded(now - reservation.decoding_since)
        if (waiting and waiting.request.attempt <= attempt) or (reservation and reservation.attempt <= attempt):
            if reservation is not None:
                reservation.num_output_tokens = num_output_tokens
            self._drop(request_id, now)

    def expire(self, now: float) -> dict[str, BatonError]:
        """Ends reservations that nobody renewed; returns the requests that will get no plan, and why.

        They waited too long, or no replica that has come since can hold them.
        """
        for request_id in self.reservations.expired(now):
            self._drop(request_id, now)
        generations = self._generations(now)
        has_decode = self.can_grow(now) or bool(generations.decodes)
        late: dict[str, BatonError] = {}
        for waiting in self._waiting.values():
            waited_s, limit_s = now - waiting.since, min(waiting.request.timeout_s, self._config.queue_timeout_s)
            if waited_s >= limit_s:
                error = Overloaded(f"no capacity within {limit_s:.0f} s", retry_after_s=limit_s / 2)
                late[waiting.request.request_id] = error
            elif (too_long := generations.too_long(waiting.request)) is not None:
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

    def _drop(self, request_id: str, now: float) -> None:
        self._waiting.pop(request_id, None)
        if (reservation := self.reservations.drop(request_id)) is not None:
            self.policy.finished(reservation, now)

    def _generations(self, now: float) -> Generations:
        return Generations.at(now, self.fleet, self.traffic, self.sizes.at(now))

    def _decide(self, request: Reserve, decodes: list[ReplicaView], now: float) -> Decision | None:
        prefills = self.fleet.in_generation(Role.PREFILL, decodes[0].info.generation, now)
        num_usable = (request.num_tokens - 1) // decodes[0].info.compatibility.block_size  # one token must be computed
        cached = self.index.match(request.block_hashes[:num_usable])
        return self.policy.decide(request, Choices(prefills, decodes, cached, now, self.fleet.by_id))

    def _book(self, waiting: _Waiting, decision: Decision, now: float) -> Plan:
        request = waiting.request
        prefill, decode = decision.prefill, decision.decode
        self.workload(decode.info.generation).planned(request.num_tokens, decision.num_uncached_tokens)
        self.policy.booked(self.reservations.book(request, decision, now), now)
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

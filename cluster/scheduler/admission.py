"""The global scheduler: pending reservations in, plans out; the one place where requests wait. Pure.

reserve --> waiting --dispatch--> reserved --progress--> decoding --finish--> gone
               |  queue full, too long a wait |           | yield (batch): asked to come back
               |  foreseen: Overloaded        +------- expiry, replica lost ----^
               +- deadline: Overloaded with Retry-After
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain

from cluster.scheduler.asked_sizes import AskedSizes
from cluster.scheduler.batch_yields import BatchYields, Yielding
from cluster.scheduler.candidate import Decision
from cluster.scheduler.decision import DecisionMaker
from cluster.scheduler.decision_log import DecisionLog
from cluster.scheduler.fair_share import FairShare
from cluster.scheduler.fleet_view import FleetView
from cluster.scheduler.generations import Generations
from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.keeping import Keeping
from cluster.scheduler.overtaking import Overtaking
from cluster.scheduler.policy import Choices, Policy
from cluster.scheduler.prefix_care import Copy
from cluster.scheduler.refusals import Refusals
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservations
from cluster.scheduler.rules import usable_hashes
from cluster.scheduler.traffic import TrafficSplit
from cluster.scheduler.triage import Triage
from cluster.scheduler.waiting_line import Waiting, WaitingLine
from cluster.scheduler.workload_meter import WorkloadMeter
from core.config import SchedulerConfig
from core.errors import BatonError, NoReplica, Overloaded, PeerLost
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import NO_PACE, Plan, Progress, ReplicaState, Report, Reserve, TokenPace
from kv_transfer.tombstones import Tombstones

PULL_PATIENCE = 3.0  # times the predicted time that a pulled prefix is waited for; then it is computed
LEAST_PATIENCE_S = 0.1


class Admission:
    """The queue, dispatched in the order of WaitingLine to what reservations leave of the fleet."""

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
        self._share = FairShare(config.tenant_weights)
        self._line = WaitingLine(self._share)
        self._refusals = Refusals(self._line, self.reservations, config.queue_limit)
        self._triage = Triage(self._line, self.index)
        self._keeping = Keeping(self._line, self.fleet, self.policy, config.max_decode_kv_usage)
        self._overtaking = Overtaking({})  # of the last round
        self.decisions = DecisionLog(config.decisions_kept)
        self._yields = BatchYields()
        self._tombstones = Tombstones()
        self._first_heard_at: float | None = None

    @property
    def num_waiting(self) -> int:
        """Requests without a plan."""
        return len(self._line)

    def can_grow(self, now: float) -> bool:
        """An autoscaler is at work: requests wait in the queue for replicas that it brings, from none too."""
        return bool(self.sizes.at(now))

    def waiting_for(self, generation: str, now: float) -> list[Reserve]:
        """Requests without a plan that a generation shall answer."""
        generations = self._generations(now)
        requests = (waiting.request for waiting in self._line)
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
        if self._first_heard_at is None:
            self._first_heard_at = now
        replica_id = report.info.replica_id
        is_new = self.fleet.update(report.info, report.status, now)
        if is_new or report.snapshot:
            self.index.remove_replica(replica_id)
        self.index.remove(replica_id, report.removed)
        self.index.store(replica_id, report.stored, report.info.layout.reaches, report.tiers)
        if (replica := self.fleet.get(replica_id)) is not None:
            replica.num_cached_blocks = self.index.num_held(replica_id)
            self.policy.reported(replica, report, now)

    def replica_lost(self, replica_id: str) -> None:
        """Its process cannot be reached, or it deregistered; its reservations are moot."""
        self.policy.lost(replica_id)
        self.fleet.remove(replica_id)
        self.index.remove_replica(replica_id)

    def reserve(self, request: Reserve, now: float) -> None:
        """Queues a request; a repeated one, or a new attempt, replaces the old.

        It waits for a decode replica too: one may be starting, or about to register with a new scheduler.
        Raises Overloaded when the line is full of its own tenant's requests, or when it would wait longer than it may;
        PromptTooLong, and StaleMessage when its Finish came first; PeerLost when a new scheduler knows fewer replicas
        than who asks: that one plans better alone.
        """
        self._tombstones.refuse(request.request_id, request.attempt)
        self._require_whole(request, now)
        self._drop(request.request_id, now)
        generations = self._generations(now)
        if (too_long := generations.too_long(request)) is not None:
            raise too_long
        waiting = self._waiting(request, now)
        self._refusals.passed(now)
        if request.attempt == 0 and not self._overtaking.has_hope(generations.answering(request), waiting):
            self._refusals.require_a_hope(waiting)
        self._line.add(waiting)
        self._refusals.require_room(waiting)
        if request.attempt == 0:
            self.workload(generations.answering(request)).arrived(now)

    def dispatch(self, now: float) -> list[Plan]:
        """Plans for waiting requests in their order; who finds no room is overtaken by shorter ones (Overtaking).

        One that avoids replicas holds nobody up: there may be room where it does not want to go. Who cannot be in time
        goes after those that can be.
        """
        self._refusals.passed(now)
        self.policy.take_held_until()  # of who waited before
        plans = []
        generations = self._generations(now)
        if self._triage.is_due(len(self.fleet.by_id), now):
            self._put_off(generations, now)
        decodes = generations.decodes
        overtaking = self._overtaking = Overtaking(self._keeping.at(decodes, now))
        late: list[Waiting] = []
        for waiting in chain(self._line.in_order(), late):
            if overtaking.is_over(decodes):
                break
            generation = generations.answering(waiting.request)
            if generation not in decodes or not overtaking.may_try(generation, waiting):
                continue
            pool = decodes[generation].replicas
            decision = self._decide(waiting.request, pool, now, overtaking.kept_id(generation, waiting))
            if decision is None:
                if waiting.request.avoid:
                    continue
                if overtaking.found_no_room(generation, waiting):
                    self._keeping.begin(generation, waiting, pool, now)
                    if not waiting.is_resumed and not any(self.policy.keeps_itl(0, decode, now) for decode in pool):
                        overtaking.end(generation)  # of however few tokens, nobody new joins
                continue
            if waiting.misses(decision.predicted_ttft_s, now):
                late += self._line.put_off([waiting])
                continue
            self._line.remove(waiting.request.request_id)
            plans.append(self._book(waiting, decision, now))
        for generation, first in overtaking.firsts().items():
            if not first.is_batch:
                self._make_room(first, generation, decodes[generation].replicas, now)
        return plans

    def dispatch_one(self, request_id: str, now: float) -> Plan | None:
        """The plan of one waiting request, whoever waits before it; None when it does not wait, or finds no room."""
        waiting, generations = self._line.find(request_id), self._generations(now)
        if waiting is None or (generation := generations.answering(waiting.request)) not in generations.decodes:
            return None
        decision = self._decide(waiting.request, generations.decodes[generation].replicas, now)
        if decision is None:
            return None
        self._line.remove(request_id)
        return self._book(waiting, decision, now)

    def take_held_until(self) -> float:
        """When to dispatch again though nothing happens, by the last dispatch; inf: no need to."""
        return self.policy.take_held_until()

    def take_yields(self) -> list[Yielding]:
        """Batch requests that others now wait for, since the last call. The caller has their decode replicas let go."""
        return self._yields.take()

    def take_copies(self) -> list[Copy]:
        """Prefixes to be copied from one replica to another, since the last call; the caller has the takers do it."""
        return self.policy.take_copies()

    def progress(self, message: Progress, now: float) -> None:
        """A request's first token is out."""
        if (reservation := self.reservations.progress(message.request_id, now)) is not None:
            reservation.num_found_tokens = message.num_cached_tokens
            self.policy.first_token(reservation, message.num_cached_tokens, now)

    def finish(
        self,
        request_id: str,
        attempt: int,
        now: float,
        num_output_tokens: int | None = None,
        pace: TokenPace = NO_PACE,
    ) -> None:
        """Ends an attempt in any state, also before its Reserve came; idempotent.

        `num_output_tokens` of one that came to its end, over all its attempts; `pace` of this attempt.
        """
        self._tombstones.bury(request_id, attempt, now)
        waiting, reservation = self._line.find(request_id), self.reservations.find(request_id)
        if reservation and reservation.attempt <= attempt and reservation.decoding_since is not None:
            self.workload(reservation.generation).decoded(now - reservation.decoding_since)
        if (waiting and waiting.request.attempt <= attempt) or (reservation and reservation.attempt <= attempt):
            if reservation is not None:
                reservation.num_output_tokens = num_output_tokens
                if reservation.attempt == attempt:
                    reservation.pace = pace
            self._drop(request_id, now)

    def expire(self, now: float) -> dict[str, BatonError]:
        """Ends reservations that nobody renewed; returns the requests that will get no plan, and why.

        They waited too long, were pushed out of a full line, or no replica that has come since can hold them.
        """
        for request_id in self.reservations.expired(now):
            self._drop(request_id, now)
        generations = self._generations(now)
        has_decode = self.can_grow(now) or bool(generations.decodes)
        late: dict[str, BatonError] = {**self._refusals.take_pushed_out()}
        retry_after_s: float | None = None  # the same for all whose time is over in this call
        for waiting in self._line:
            request, waited_s = waiting.request, now - waiting.since
            if waited_s >= waiting.timeout_s:
                if retry_after_s is None:
                    retry_after_s = self._refusals.retry_after_s(waiting)
                message = f"no capacity within {waiting.timeout_s:.0f} s"
                late[request.request_id] = Overloaded(message, retry_after_s=retry_after_s)
            elif (too_long := generations.too_long(request)) is not None:
                late[request.request_id] = too_long
            elif not has_decode and waited_s >= self._config.no_replica_timeout_s:
                late[request.request_id] = NoReplica("no decode replica is ready", retry_after_s=2.0)
        for request_id in late:
            self._line.remove(request_id)
        return late

    def book(self, now: float) -> tuple[ReplicaInfo, ...]:
        """Replicas that take new work."""
        return tuple(replica.info for role in Role for replica in self.fleet.usable(role, now))

    def replicas(self, now: float) -> tuple[ReplicaState, ...]:
        """Every replica that is known, also those that take no work."""
        return tuple(ReplicaState(r.info, r.status, now - r.seen_at) for r in self.fleet)

    def _drop(self, request_id: str, now: float) -> None:
        self._line.remove(request_id)
        if (reservation := self.reservations.drop(request_id)) is not None:
            reservation.finished_at = now
            self._share.ended(request_id, reservation.num_output_tokens)
            self.policy.finished(reservation, now)

    def _generations(self, now: float) -> Generations:
        return Generations.at(now, self.fleet, self.traffic, self.sizes.at(now))

    def _decide(self, request: Reserve, decodes: list[ReplicaView], now: float, kept_id: str = "") -> Decision | None:
        prefills = self.fleet.in_generation(Role.PREFILL, decodes[0].info.generation, now)
        cached = self.index.match(usable_hashes(request, decodes[0].info.compatibility.block_size))
        return self.policy.decide(request, Choices(prefills, decodes, cached, now, self.fleet.by_id, kept_id))

    def _put_off(self, generations: Generations, now: float) -> None:
        """Where all traffic goes to one generation: of those that shift it, each has a part of the line."""
        if len(generations.decodes) != 1 or generations.asleep:
            return
        ((generation, pool),) = generations.decodes.items()
        pace = self.policy.pace(self.fleet.in_generation(Role.PREFILL, generation, now), pool.replicas, now)
        if pace is not None:
            self._triage.put_off(pace, pool.replicas[0].info.compatibility.block_size, now)

    def _waiting(self, request: Reserve, now: float) -> Waiting:
        target = self._config.slo.target(request.slo_class)
        timeout_s = min(request.timeout_s, target.queue_timeout_s or self._config.queue_timeout_s)
        return Waiting(request, now, now + (request.ttft_slo_s or target.ttft_s), timeout_s)

    def _require_whole(self, request: Reserve, now: float) -> None:
        """Raises PeerLost."""
        is_new = self._first_heard_at is None or now - self._first_heard_at < self._config.settle_s
        if is_new and len(self.fleet.by_id) < request.num_known_replicas:
            num = f"{len(self.fleet.by_id)} of {request.num_known_replicas} replicas"
            raise PeerLost(f"the global scheduler has just started: it has heard of {num}")

    def _make_room(self, waiting: Waiting, generation: str, decodes: Sequence[ReplicaView], now: float) -> None:
        """Where decode is what is full, batch work is in the way."""
        if not self._keeping.any_has_room(waiting.request.num_tokens + 1, decodes, now):
            self._yields.choose((one for one in self.reservations if one.generation == generation), now)

    def _book(self, waiting: Waiting, decision: Decision, now: float) -> Plan:
        request = waiting.request
        prefill, decode = decision.prefill, decision.decode
        self.workload(decode.info.generation).planned(request.num_tokens, decision.num_uncached_tokens)
        self._refusals.dispatched(waiting, now)
        num_new = min(decision.num_expected_tokens, request.max_new_tokens)
        self._share.taken(request.request_id, request.tenant, decision.num_uncached_tokens, num_new)
        reservation = self.reservations.book(request, decision, now)
        self.decisions.add(reservation, now - waiting.since)
        self.policy.booked(reservation, now)
        return Plan(
            request.request_id,
            request.attempt,
            prefill.info if prefill else None,
            decode.info,
            now - waiting.since,
            decision.predicted_ttft_s,
            decision.reason,
            decision.lender.info if decision.lender else None,
            LEAST_PATIENCE_S + PULL_PATIENCE * decision.terms.pull_s if decision.lender else 0.0,
        )

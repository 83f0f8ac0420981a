"""Plays a record of decisions to another policy: at each one, what it would have chosen, and what that was worth. Pure.

History stays as it was: the recorded decision is carried out, so that both policies see the same fleet at every step.
What a choice is worth is foreseen by the production policy, with what it had learned by then, for both alike. How a
fleet fares under another policy from start to end is the twin's to say: `baton simulate`. Requests that history gave
no plan are counted: a record has them before the scheduler refused them.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

from cluster.scheduler.admission import Admission
from cluster.scheduler.candidate import Decision, Terms
from cluster.scheduler.decision import DecisionMaker
from cluster.scheduler.policy import Choices, Policy
from cluster.scheduler.prefix_care import Copy
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservation
from core.config import SchedulerConfig
from core.errors import BatonError
from core.messages.to_scheduler import Deregister, Finish, Foresight, Plan, Progress, Report, Reserve

Event = Report | Deregister | Reserve | Plan | Progress | Finish
Pair = tuple[str, str]  # ids of prefill, empty for none, and decode


@dataclass(frozen=True)
class Replayed:
    """One decision. Seconds until the first token, from dispatch; None: not foreseen, or never measured."""

    request_id: str
    reason: str
    recorded: Pair
    chosen: Pair | None  # None: the other policy would have had it wait
    recorded_s: float | None
    chosen_s: float | None
    measured_s: float | None = None

    @property
    def agrees(self) -> bool:
        """Both chose the same replicas."""
        return self.chosen == self.recorded


class Shadow:
    """Stands where the scheduler's policy stood: asks another one, and answers what was recorded."""

    def __init__(self, other: Policy, config: SchedulerConfig) -> None:
        self._other = other
        self._judge = DecisionMaker(config, exhaustive=True)
        self._expected: Plan | None = None
        self.replayed: dict[tuple[str, int], Replayed] = {}

    def expect(self, plan: Plan) -> None:
        """The next question has this answer."""
        self._expected = plan

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """See Policy."""
        plan, self._expected = self._expected, None
        decode = choices.everyone.get(plan.decode.replica_id) if plan is not None else None
        if plan is None or decode is None:
            return None
        prefill = choices.everyone.get(plan.prefill.replica_id) if plan.prefill is not None else None
        wish = self._other.decide(request, choices)
        recorded = self._foreseen(request, choices, prefill, decode)
        chosen = self._foreseen(request, choices, wish.prefill, wish.decode) if wish is not None else None
        self.replayed[request.request_id, request.attempt] = Replayed(
            request.request_id,
            plan.reason,
            _pair(prefill, decode),
            _pair(wish.prefill, wish.decode) if wish is not None else None,
            recorded.predicted_ttft_s if recorded is not None else None,
            chosen.predicted_ttft_s if chosen is not None else None,
        )
        return recorded if recorded is not None else _as_recorded(plan, prefill, decode, request)

    def _foreseen(
        self, request: Reserve, choices: Choices, prefill: ReplicaView | None, decode: ReplicaView
    ) -> Decision | None:
        """What the production policy makes of these replicas; None when it would not take them."""
        placement = "local" if prefill is None else "pair"
        only = replace(choices, prefills=[prefill] if prefill is not None else [], decodes=[decode])
        asked = replace(request, placement=placement, avoid=(), num_shown=1)  # full batches take it, too
        decision = self._judge.decide(asked, only)
        return decision if decision is not None and (decision.prefill is None) == (prefill is None) else None

    # ---- both learn ---------------------------------------------------------------------------------------------

    def reported(self, replica: ReplicaView, report: Report, now: float) -> None:
        """See Policy."""
        for policy in (self._other, self._judge):
            policy.reported(replica, report, now)

    def lost(self, replica_id: str) -> None:
        """See Policy."""
        for policy in (self._other, self._judge):
            policy.lost(replica_id)

    def booked(self, reservation: Reservation, now: float) -> None:
        """See Policy."""
        for policy in (self._other, self._judge):
            policy.booked(reservation, now)

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """See Policy."""
        for policy in (self._other, self._judge):
            policy.first_token(reservation, num_cached_tokens, now)
        key = reservation.request_id, reservation.attempt
        if key in self.replayed:
            self.replayed[key] = replace(self.replayed[key], measured_s=now - reservation.booked_at)

    def finished(self, reservation: Reservation, now: float) -> None:
        """See Policy."""
        for policy in (self._other, self._judge):
            policy.finished(reservation, now)

    def foresight(self) -> Foresight | None:
        """See Policy."""
        return self._judge.foresight()

    def pace(self, prefills: Sequence[ReplicaView], decodes: Sequence[ReplicaView], now: float) -> None:
        """History has its order."""

    def keeps_itl(self, num_tokens: int, decode: ReplicaView, now: float) -> bool:  # noqa: ARG002
        """History had who yields."""
        return True

    def take_held_until(self) -> float:
        """History tells when somebody looked."""
        return inf

    def take_copies(self) -> list[Copy]:
        """History had its own."""
        return []


@dataclass(frozen=True)
class Replay:
    """Of a whole record."""

    decisions: list[Replayed]  # in their order
    num_unplanned: int  # attempts that were refused, given up while they waited, or waited when the record ended


def replay(events: Iterable[tuple[float, Event]], config: SchedulerConfig, other: Policy) -> Replay:
    """The recorded decisions; `config` is the recorded scheduler's."""
    shadow = Shadow(other, config)
    admission = Admission(_patient(config), policy=shadow)
    unplanned: set[tuple[str, int]] = set()
    for now, event in events:
        match event:
            case Report():
                admission.report(event, now)
            case Deregister():
                admission.replica_lost(event.replica_id)
            case Reserve():
                unplanned.add((event.request_id, event.attempt))
                with suppress(BatonError):  # it has no plan then, as in history
                    admission.reserve(replace(event, timeout_s=inf, num_known_replicas=0), now)
            case Plan():
                unplanned.discard((event.request_id, event.attempt))
                shadow.expect(event)
                admission.dispatch_one(event.request_id, now)
            case Progress():
                admission.progress(event, now)
            case Finish():
                admission.finish(event.request_id, event.attempt, now, event.num_output_tokens)
    return Replay(list(shadow.replayed.values()), len(unplanned))


def _patient(config: SchedulerConfig) -> SchedulerConfig:
    """Nobody is refused, or late, for want of room: whom that befell has no plan in the record."""
    names = type(config.slo).model_fields
    slo = {name: config.slo.target(name).model_copy(update={"queue_timeout_s": inf}) for name in names}
    return config.model_copy(update={"queue_limit": 2**31, "slo": config.slo.model_copy(update=slo)})


def _pair(prefill: ReplicaView | None, decode: ReplicaView) -> Pair:
    return prefill.info.replica_id if prefill is not None else "", decode.info.replica_id


def _as_recorded(plan: Plan, prefill: ReplicaView | None, decode: ReplicaView, request: Reserve) -> Decision:
    """Without terms: nobody foresees anything for what the production policy would not do."""
    num_blocks = decode.info.layout.num_blocks_missing(0, request.num_tokens)
    return Decision(prefill, decode, plan.reason, Terms(), request.num_tokens, num_blocks)

"""The latest decisions with what they were made of and what came of them, for whoever asks why. Pure."""

from collections import deque
from collections.abc import Iterator

from cluster.scheduler.candidate import Candidate
from cluster.scheduler.reservations import Reservation
from core.messages.to_scheduler import Explained, ExplainedCandidate

_ANSWER_PREFIXES = ("chatcmpl-", "cmpl-")  # of the ids that answers carry


class DecisionLog:
    """A ring: the oldest are forgotten. Prompts' hashes, by far the largest part, are gone once a request is over."""

    def __init__(self, capacity: int) -> None:
        self._kept: deque[tuple[Reservation, float]] = deque(maxlen=capacity)

    def add(self, reservation: Reservation, queue_s: float) -> None:
        """A decision is in force; what comes of it is read off the reservation."""
        self._kept.append((reservation, queue_s))

    def find(self, name: str) -> tuple[Explained, ...]:
        """All attempts of the requests of this name, the oldest first.

        A name is a request's own id, the id of an answer, or the X-Request-Id of a call, which may have many choices.
        """
        for prefix in _ANSWER_PREFIXES:
            name = name.removeprefix(prefix)
        return tuple(
            _explained(reservation, queue_s)
            for reservation, queue_s in self._kept
            if reservation.request_id == name or reservation.request_id.startswith(f"{name}-")
        )


def _explained(reservation: Reservation, queue_s: float) -> Explained:
    request, decision = reservation.request, reservation.decision
    since, pace = reservation.decoding_since, reservation.pace
    return Explained(
        request_id=reservation.request_id,
        attempt=reservation.attempt,
        tenant=request.tenant,
        slo_class=request.slo_class,
        num_tokens=request.num_tokens,
        max_new_tokens=request.max_new_tokens,
        num_expected_tokens=decision.num_expected_tokens,
        num_cached_tokens=decision.num_cached_tokens,
        queue_s=queue_s,
        candidates=tuple(_candidates(reservation)),
        actual_first_token_s=None if since is None else since - reservation.booked_at,
        actual_itl_s=pace.itl_s,
        actual_cached_tokens=reservation.num_found_tokens,
        actual_output_tokens=reservation.num_output_tokens,
        is_over=reservation.finished_at is not None,
        actual_handoff_s=pace.handoff_s,
    )


def _candidates(reservation: Reservation) -> Iterator[ExplainedCandidate]:
    """The chosen one first; of a policy that keeps none, that one alone."""
    decision = reservation.decision
    lender = decision.lender.info.replica_id if decision.lender else ""
    chosen = Candidate(reservation.prefill_id or "", reservation.decode_id, lender, decision.reason, decision.terms)
    for candidate in decision.candidates or (chosen,):
        yield ExplainedCandidate(
            candidate.prefill_id, candidate.decode_id, candidate.lender_id, candidate.reason, *candidate.terms
        )

"""Dispatched requests, and what each of them holds of its replicas until it finishes or nobody renews it. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf

from cluster.scheduler.candidate import Decision
from cluster.scheduler.fleet_view import FleetView
from cluster.scheduler.replica_view import Growth, ReplicaView
from core.messages.to_scheduler import NO_PACE, Reserve, TokenPace


@dataclass
class Reservation:
    """A dispatched request."""

    request_id: str
    attempt: int
    prefill_id: str | None
    decode_id: str
    generation: str
    expires_at: float
    request: Reserve
    decision: Decision
    booked_at: float
    decoding_since: float | None = None
    num_output_tokens: int | None = None  # over all attempts, once the request has come to its end
    num_found_tokens: int | None = None  # of the prompt, that prefill found cached
    finished_at: float | None = None
    pace: TokenPace = NO_PACE  # of its tokens, once it has ended
    asked_to_yield_at: float = -inf  # for the last time


class Reservations:
    """One per request. What a replica holds is written in the fleet's view of it."""

    def __init__(self, fleet: FleetView, ttl_s: float) -> None:
        self._fleet = fleet
        self._ttl_s = ttl_s
        self._reservations: dict[str, Reservation] = {}
        self.num_prompt_tokens = 0  # of those without a first token

    def __len__(self) -> int:
        return len(self._reservations)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._reservations.values())

    def find(self, request_id: str) -> Reservation | None:
        """The request's, if it was dispatched and is not over."""
        return self._reservations.get(request_id)

    def book(self, request: Reserve, decision: Decision, now: float) -> Reservation:
        """Reserves what a decision takes of its replicas."""
        prefill, decode = decision.prefill, decision.decode
        request_id, num_uncached = request.request_id, decision.num_uncached_tokens
        (prefill or decode).reserve_prefill(request_id, num_uncached, decision.terms.prefill_s)
        growth = Growth(request.num_tokens, decision.num_expected_tokens)
        decode.reserve_decode(request_id, decision.num_decode_blocks, growth)
        reservation = self._reservations[request_id] = Reservation(
            request.request_id,
            request.attempt,
            prefill.info.replica_id if prefill else None,
            decode.info.replica_id,
            decode.info.generation,
            now + self._ttl_s,
            request,
            decision,
            now,
        )
        self.num_prompt_tokens += request.num_tokens
        return reservation

    def progress(self, request_id: str, now: float) -> Reservation | None:
        """Its first token is out: prefill is free again, and decode's own report counts its blocks.

        None when the request is unknown, or its first token was out before.
        """
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.decoding_since is not None:
            return None
        reservation.decoding_since = now
        self.num_prompt_tokens -= reservation.request.num_tokens
        for replica in self._replicas_of(reservation):
            replica.free_prefill(request_id)
            replica.has_joined(request_id, now)
        return reservation

    def drop(self, request_id: str) -> Reservation | None:
        """Its replicas are free of it; returns what was dropped. Idempotent."""
        reservation = self._reservations.pop(request_id, None)
        if reservation is not None:
            if reservation.decoding_since is None:
                self.num_prompt_tokens -= reservation.request.num_tokens
            for replica in self._replicas_of(reservation):
                replica.free_prefill(request_id)
                replica.free_decode(request_id)
            reservation.request = replace(
                reservation.request, block_hashes=()
            )  # the log of decisions may keep the rest
        return reservation

    def renew(self, request_ids: Iterable[str], now: float) -> None:
        """Keeps reservations alive; unknown ones are ignored (a restarted scheduler knows none)."""
        for request_id in request_ids:
            if request_id in self._reservations:
                self._reservations[request_id].expires_at = now + self._ttl_s

    def expired(self, now: float) -> list[str]:
        """Requests that nobody renewed in time; the caller drops them."""
        return [reservation.request_id for reservation in self._reservations.values() if reservation.expires_at <= now]

    def _replicas_of(self, reservation: Reservation) -> list[ReplicaView]:
        ids = (reservation.prefill_id, reservation.decode_id)
        return [replica for i in ids if i is not None and (replica := self._fleet.get(i)) is not None]

"""Batch requests give their place in decode up to others that wait. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.scheduler.reservations import Reservation
from core.messages.fleet import ReplicaInfo


@dataclass(frozen=True)
class Yielding:
    """A batch request that shall make room on its decode replica; its ingress plans the rest anew."""

    request_id: str
    attempt: int
    decode: ReplicaInfo


YIELD_WITHIN_S = 2.0  # then another one is asked, or this one again: what it was told may have been lost


class BatchYields:
    """Those that were chosen and that nobody was told of yet."""

    def __init__(self) -> None:
        self._chosen: list[Yielding] = []

    def choose(self, reservations: Iterable[Reservation], now: float) -> None:
        """Has the youngest of a generation's batch requests yield, one at a time."""
        batch = [reservation for reservation in reservations if reservation.request.is_batch]
        decoding = [reservation for reservation in batch if reservation.decoding_since is not None]
        if not decoding or any(now - reservation.asked_to_yield_at < YIELD_WITHIN_S for reservation in batch):
            return
        youngest = max(decoding, key=lambda reservation: (-reservation.asked_to_yield_at, reservation.booked_at))
        youngest.asked_to_yield_at = now
        self._chosen.append(Yielding(youngest.request_id, youngest.attempt, youngest.decision.decode.info))

    def take(self) -> list[Yielding]:
        """Those chosen since the last call."""
        chosen, self._chosen = self._chosen, []
        return chosen

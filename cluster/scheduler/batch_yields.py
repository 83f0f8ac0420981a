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


class BatchYields:
    """Those that were chosen and that nobody was told of yet."""

    def __init__(self) -> None:
        self._chosen: list[Yielding] = []

    def choose(self, reservations: Iterable[Reservation]) -> None:
        """Has the youngest of a generation's batch requests yield, one at a time."""
        batch = [reservation for reservation in reservations if reservation.request.is_batch]
        decoding = [reservation for reservation in batch if reservation.decoding_since is not None]
        if not decoding or any(reservation.yielding for reservation in batch):
            return
        youngest = max(decoding, key=lambda reservation: reservation.booked_at)
        youngest.yielding = True
        self._chosen.append(Yielding(youngest.request_id, youngest.attempt, youngest.decision.decode.info))

    def take(self) -> list[Yielding]:
        """Those chosen since the last call."""
        chosen, self._chosen = self._chosen, []
        return chosen

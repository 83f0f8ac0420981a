"""The seam between the queue and the choice of replicas: what a policy sees, decides and is told. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from cluster.scheduler.candidate import Decision
from cluster.scheduler.matches import Matches
from cluster.scheduler.pace import Pace
from cluster.scheduler.prefix_care import Copy
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservation
from core.messages.to_scheduler import Foresight, Report, Reserve


@dataclass(frozen=True)
class Choices:
    """What one request can be given at one moment: replicas that live and take work, of one generation.

    Loads are in the views. Whether a replica has room, may pair, or shall be avoided, is the policy's to ask of
    `cluster.scheduler.rules`.
    """

    prefills: Sequence[ReplicaView]
    decodes: Sequence[ReplicaView]  # at least one
    cached: Matches  # leading blocks of the prompt, by replica id; those without any are left out
    now: float
    everyone: Mapping[str, ReplicaView]  # of the whole fleet, those that take no work included, by id
    kept_id: str = ""  # the decode replica whose memory is kept for who has waited longer


class Policy(Protocol):
    """Chooses, and may learn from what it is told."""

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """Where a request goes now; None has it wait, and longer ones of its generation behind it."""
        ...

    def reported(self, replica: ReplicaView, report: Report, now: float) -> None:
        """A replica's report has been taken into its view."""
        ...

    def lost(self, replica_id: str) -> None:
        """A replica is gone."""
        ...

    def booked(self, reservation: Reservation, now: float) -> None:
        """A decision is in force: the views of its replicas count it."""
        ...

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """A request's first token is out; what prefill found cached, when that is known."""
        ...

    def finished(self, reservation: Reservation, now: float) -> None:
        """A request that had a decision is over, whatever ended it."""
        ...

    def foresight(self) -> Foresight | None:
        """How its predictions compare with what came, if it predicts."""
        ...

    def pace(self, prefills: Sequence[ReplicaView], decodes: Sequence[ReplicaView], now: float) -> Pace | None:
        """How fast prompts are computed there, if it can say; where nobody prefills, by decode replicas."""
        ...

    def keeps_itl(self, num_tokens: int, decode: ReplicaView, now: float) -> bool:
        """Whether a sequence of so many tokens may join a batch for the time that its steps take then."""
        ...

    def take_held_until(self) -> float:
        """When someone who had to wait since the last call may find room though nobody reports anything; or inf."""
        ...

    def take_copies(self) -> list[Copy]:
        """Prefixes that replicas shall take over from others, beside all requests, since the last call."""
        ...


class Memoryless:
    """The part of policies that learn nothing."""

    def reported(self, replica: ReplicaView, report: Report, now: float) -> None:
        """Loads are in the view."""

    def lost(self, replica_id: str) -> None:
        """It is no longer among the choices."""

    def booked(self, reservation: Reservation, now: float) -> None:
        """The view of its replicas says so."""

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """The view of its replicas says so."""

    def finished(self, reservation: Reservation, now: float) -> None:
        """The view of its replicas says so."""

    def foresight(self) -> Foresight | None:
        """Nothing is predicted that could be compared."""
        return None

    def pace(self, prefills: Sequence[ReplicaView], decodes: Sequence[ReplicaView], now: float) -> Pace | None:  # noqa: ARG002
        """Nothing is learned that would tell."""
        return None

    def keeps_itl(self, num_tokens: int, decode: ReplicaView, now: float) -> bool:  # noqa: ARG002
        """Memory alone counts."""
        return True

    def take_held_until(self) -> float:
        """Room comes with reports alone."""
        return inf

    def take_copies(self) -> list[Copy]:
        """Requests alone spread prefixes."""
        return []

"""What the production policy learns of reports and of requests that ran: costs, links, lengths, its errors. Pure."""

from cluster.scheduler.accuracy import Accuracy
from cluster.scheduler.cost_book import CostBook
from cluster.scheduler.expected_length import ExpectedLength
from cluster.scheduler.flights import Flights
from cluster.scheduler.hits import HitCheck
from cluster.scheduler.link_book import LinkBook
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.reservations import Reservation
from core.messages.fleet import Role
from core.messages.to_scheduler import Foresight, Report


class Learned:
    """Events in; the parts are asked directly."""

    def __init__(self) -> None:
        self.costs = CostBook()
        self.links = LinkBook()
        self.lengths = ExpectedLength()
        self.flights = Flights()
        self._hits = HitCheck()
        self._ttft = Accuracy("ttft")

    def reported(self, replica: ReplicaView, report: Report) -> None:
        """Samples of steps and transfers."""
        self.costs.heard(replica, report.steps)
        self.links.heard(replica, report.transfers)
        if report.info.role is Role.DECODE:
            self.flights.heard(report.info.replica_id, report.status.links, report.status.num_waiting)

    def lost(self, replica_id: str) -> None:
        """A replica is gone."""
        self.costs.lost(replica_id)
        self.links.lost(replica_id)
        self.flights.lost(replica_id)

    def booked(self, reservation: Reservation) -> None:
        """A decision is in force."""
        if reservation.prefill_id is not None:
            num_bytes = reservation.decision.num_transfer_bytes
            self.flights.begin(reservation.request_id, reservation.prefill_id, reservation.decode_id, num_bytes)

    def first_token(self, reservation: Reservation, num_cached_tokens: int | None, now: float) -> None:
        """A prompt is computed."""
        self.flights.computed(reservation.request_id)
        self._ttft.add(reservation.decision.terms.first_token_s, now - reservation.booked_at)
        if num_cached_tokens is not None:
            self._hits.found(reservation, num_cached_tokens)

    def finished(self, reservation: Reservation) -> None:
        """A request is over."""
        self.flights.end(reservation.request_id)
        if reservation.num_output_tokens is not None:
            self.lengths.ended(reservation.generation, reservation.request.tenant, reservation.num_output_tokens)

    def foresight(self) -> Foresight:
        """How predictions compare with what came."""
        errors = self._ttft.summary(), self.costs.itl_accuracy.summary()
        return Foresight(errors, self._hits.num_checked, self._hits.num_missed, self._hits.num_tokens_missed)

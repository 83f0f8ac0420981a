"""Whether what a plan counted on was cached when prefill looked. Pure."""

import logging

from cluster.scheduler.reservations import Reservation

logger = logging.getLogger(__name__)


class HitCheck:
    """Counts since the scheduler started."""

    def __init__(self) -> None:
        self.num_checked = 0
        self.num_missed = 0
        self.num_tokens_missed = 0

    def found(self, reservation: Reservation, num_cached_tokens: int) -> None:
        """What prefill found of a request's prompt, where some of it was cached when it was planned.

        More is no miss: others computed it meanwhile. Nor is it one of the cache when these came to nothing.
        """
        planned = reservation.decision.num_indexed_tokens
        if not planned:
            return
        self.num_checked += 1
        if num_cached_tokens < planned:
            self.num_missed += 1
            self.num_tokens_missed += planned - num_cached_tokens
            logger.warning(
                "%s was planned with %d cached tokens and found %d",
                reservation.prefill_id or reservation.decode_id,
                planned,
                num_cached_tokens,
                extra={"request_id": reservation.request_id},
            )

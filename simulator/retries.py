"""What an ingress does about a failed attempt: the rules of cluster/ingress/orchestrator.py's `generate`. Pure."""

from core.errors import BatonError, PeerError, RequestTimeout, Unavailable
from simulator.request import Request

RETRY_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0


class NoRoom(Exception):
    """The planned replica is full, drains or preempts: nobody failed, another plan is due."""


def pause_before_next(request: Request, error: BatonError | NoRoom, max_attempts: int) -> float | None:
    """Seconds until the next attempt; None: the client gets the error. Counts the failure in the request's books.

    A request that ends its replicas fails after `max_attempts` in a row without progress; one that was never taken is
    refused at once; one under way waits for capacity.
    """
    if isinstance(error, PeerError):
        request.num_failures += 1
        if not error.retryable or request.num_failures >= max_attempts:
            return None
        request.num_resumes += 1
        return RETRY_PAUSE_S * (request.num_failures - 1)
    if isinstance(error, NoRoom):
        request.num_resumes += 1
        return RETRY_PAUSE_S
    if isinstance(error, Unavailable) and request.attempt > 0 and not isinstance(error, RequestTimeout):
        request.avoid.clear()  # those that are left may be the avoided ones
        return min(error.retry_after_s or RETRY_PAUSE_S, LONGEST_PAUSE_S)
    return None

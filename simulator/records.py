"""What became of each request, in few numbers. Pure."""

from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from simulator.request import Request

COMPLETED = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Record:
    """One arrival. Times in seconds since the trace began; NaN for what did not come."""

    request_id: str
    arrived_s: float
    first_token_s: float
    finished_s: float
    queued_s: float  # at the scheduler, over all attempts
    num_prompt_tokens: int
    num_output_tokens: int  # that the client got
    num_cached_tokens: int
    itl_mean_s: float
    itl_max_s: float
    itl_p99_s: float
    prefill: str  # replica of the last attempt; empty: decode
    decode: str
    reason: str  # why there
    predicted_ttft_s: float  # by the scheduler, from that plan on; 0: a policy that predicts nothing
    num_attempts: int
    num_transfer_bytes: int
    outcome: str  # "stop" or "length", else the name of the error that the client got
    tenant: str = ""
    slo_class: str = "standard"

    @property
    def is_completed(self) -> bool:
        """The client has its whole answer."""
        return self.outcome in COMPLETED

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Mean time of each token after the first; 0 of answers of one token."""
        return self.itl_mean_s

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether the whole answer came as fast as that."""
        return self.is_completed and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


def make_record(request: Request, outcome: str, now: float) -> tuple[Record, "Gaps"]:
    """Of a request that is over, and the gaps between its tokens."""
    plan = request.last_plan
    times = request.shown
    gaps: Gaps = np.diff(np.array(times)) if len(times) > 1 else np.empty(0)
    ordered = np.sort(gaps)
    num = len(gaps)
    return Record(
        request.request_id,
        request.arrived_at,
        times[0] if times else float("nan"),
        now,
        request.queued_s,
        len(request.prompt),
        len(times),
        request.num_cached or 0,
        (times[-1] - times[0]) / num if num else 0.0,
        float(ordered[-1]) if num else 0.0,
        float(ordered[ceil(0.99 * num) - 1]) if num else 0.0,
        plan.prefill.replica_id if plan is not None and plan.prefill is not None else "",
        plan.decode.replica_id if plan is not None else "",
        plan.reason if plan is not None else "",
        plan.predicted_ttft_s if plan is not None else 0.0,
        request.attempt + 1,
        request.num_transfer_bytes,
        outcome,
        request.salt,
        request.slo_class,
    ), gaps


Gaps = NDArray[np.float64]


class GapHistogram:
    """Times between tokens of all requests, in bins half a percent wide; each percentile is right to that."""

    LOWEST_S = 1e-5
    STEP = log(1.005)

    def __init__(self) -> None:
        self._counts = np.zeros(4096, dtype=np.int64)
        self._pending: list[Gaps] = []
        self._num_pending = 0

    def add(self, gaps: Gaps) -> None:
        """Takes some in."""
        self._pending.append(gaps)
        self._num_pending += len(gaps)
        if self._num_pending > 100_000:
            self._count()

    def percentiles(self, shares: tuple[float, ...]) -> list[float]:
        """Seconds that these shares of all gaps do not exceed; 0 where there are none."""
        self._count()
        total = int(self._counts.sum())
        if not total:
            return [0.0] * len(shares)
        below = np.cumsum(self._counts)
        bins = [int(np.searchsorted(below, share * total)) for share in shares]
        return [self.LOWEST_S * float(np.exp((number + 0.5) * self.STEP)) for number in bins]

    def _count(self) -> None:
        if self._num_pending:
            gaps = np.concatenate(self._pending)
            numbers = (np.log(np.maximum(gaps, self.LOWEST_S) / self.LOWEST_S) / self.STEP).astype(np.int64)
            self._counts += np.bincount(np.minimum(numbers, 4095), minlength=4096)
            self._pending, self._num_pending = [], 0

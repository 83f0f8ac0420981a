"""What an ITL near its SLO or beyond costs, in seconds of TTFT, so that both are one cost. Pure."""

from typing import NamedTuple

NEAR = 0.8  # of the SLO: requests that come later, and answers that are longer than expected, need the rest
MOST_OF_SLO = 0.97  # of the SLO: nobody joins a batch beyond it; what is foreseen is a few percent off
WEIGHT = 3.0  # an ITL of twice its SLO is as bad as a TTFT that is later by so many times its own


class Strain(NamedTuple):
    """Of the standard class's TTFT, whoever asks, and of one request's ITL."""

    ttft_slo_s: float
    itl_slo_s: float

    def seconds(self, itl_s: float) -> float:
        """Of a batch."""
        beyond = itl_s / self.itl_slo_s - NEAR
        return WEIGHT * self.ttft_slo_s * beyond if beyond > 0 else 0.0

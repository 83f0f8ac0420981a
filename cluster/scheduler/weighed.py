"""A candidate with what it costs, comparable with others, and written out for those who ask why. Pure."""

from collections.abc import Sequence
from typing import NamedTuple, overload

from cluster.scheduler.candidate import Candidate, Terms
from cluster.scheduler.site import Site
from cluster.scheduler.source import Source


class Sink(NamedTuple):
    """A decode replica."""

    excess: int  # tenths of the SLO that the ITL is beyond it
    wait_s: float  # until its batch takes the request in
    num_reserved: int
    itl_s: float  # with the request in its batch
    num_bytes: int  # of KV that it lacks
    num_blocks: int
    depth: int  # leading blocks that it has cached
    site: Site


class Weighed(NamedTuple):
    """A candidate. Ranks are integers, quick to compare; ids after them make a decision repeatable."""

    rank: int
    prefill_id: str
    decode_id: str
    reason: str
    source: Source
    sink: Sink
    transfer_s: float
    itl_s: float

    @property
    def crosses_zones(self) -> bool:
        """Its ends lie in two zones, and that counts."""
        return self.rank >= CROSSING

    @property
    def terms(self) -> Terms:
        """Local prefill waits for no batch: it is its own."""
        queue_s, pull_s, restore_s, prefill_s = self.source[1:5]
        wait_s = self.sink.wait_s if self.reason == "pair" else 0.0
        return Terms(queue_s, pull_s, restore_s, prefill_s, self.transfer_s, wait_s, self.itl_s)


# What decides, in this order: crosses zones, tenths of the SLO that the ITL is beyond it, TTFT, reservations.
RESERVATION, TICK, TENTH, CROSSING = 1, 1 << 12, 1 << 44, 1 << 60
TICKS_PER_S = 10_000  # differences below 0.1 ms are none
MOST_TENTHS = (1 << 15) - 1


def rank_of(ttft_s: float, excess: int, num_reserved: int) -> int:
    """Of a candidate within one zone, the smallest is the best."""
    return excess * TENTH + int(ttft_s * TICKS_PER_S + 0.5) * TICK + min(num_reserved, TICK - 1)


def excess_of(itl_s: float, slo_s: float) -> int:
    """Tenths of the SLO."""
    return min(MOST_TENTHS, int(10 * itl_s / slo_s - 9.5)) if itl_s > slo_s else 0


class Explained(Sequence[Candidate]):
    """Candidates for those who ask why, written out when they do."""

    def __init__(self, weighed: Sequence[Weighed]) -> None:
        self._weighed = weighed

    def __len__(self) -> int:
        return len(self._weighed)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> "Explained": ...
    def __getitem__(self, index: int | slice) -> "Candidate | Explained":
        if isinstance(index, slice):
            return Explained(self._weighed[index])
        one = self._weighed[index]
        lender_id = one.source.lender.replica_id if one.source.lender is not None else ""
        return Candidate(one.prefill_id, one.decode_id, lender_id, one.reason, one.terms)

"""A candidate with what it costs, comparable with others, and written out for those who ask why. Pure."""

from collections.abc import Sequence
from typing import overload

from cluster.scheduler.candidate import Candidate, Terms
from cluster.scheduler.site import Site
from cluster.scheduler.source import Source


class Sink:
    """A decode replica. A plain class: each decision makes several, and quickly."""

    __slots__ = (
        "depth",
        "evict_s",
        "itl_s",
        "num_blocks",
        "num_bytes",
        "num_reserved",
        "site",
        "step_s",
        "strain_s",
        "wait_s",
    )  # fmt: skip

    def __init__(
        self,
        site: Site,
        depth: int,
        num_blocks: int,
        num_bytes: int,
        wait_s: float,
        step_s: float,
        itl_s: float,
        strain_s: float,
    ) -> None:
        self.site = site
        self.num_reserved = site.num_reserved
        self.evict_s = site.evict_s(num_blocks)  # no part of TTFT, but others'
        self.depth = depth  # leading blocks that it has cached
        self.num_blocks = num_blocks  # that it lacks
        self.num_bytes = num_bytes  # of KV in them
        self.wait_s = wait_s  # until its batch takes the request in
        self.step_s = step_s  # of its batch with the request in it
        self.itl_s = itl_s  # likewise, on average beside the prompts that it computes
        self.strain_s = strain_s  # what that ITL counts for


class Weighed:
    """A candidate, compared by its place. Ranks are integers, quick to compare."""

    __slots__ = ("itl_s", "rank", "reason", "sink", "source", "strain_s", "transfer_s")

    def __init__(
        self, rank: int, reason: str, source: Source, sink: Sink, transfer_s: float, itl_s: float, strain_s: float
    ) -> None:
        self.rank = rank
        self.reason = reason
        self.source = source
        self.sink = sink
        self.transfer_s = transfer_s
        self.itl_s = itl_s
        self.strain_s = strain_s

    @property
    def prefill_id(self) -> str:
        """Empty for local prefill."""
        return self.source.site.replica_id if self.reason == "pair" else ""

    @property
    def place(self) -> tuple[int, str, str]:
        """Lower ones first; ids after the rank make a decision repeatable."""
        return self.rank, self.prefill_id, self.sink.site.replica_id

    @property
    def crosses_zones(self) -> bool:
        """Its ends lie in two zones, and that counts."""
        return self.rank >= CROSSING

    @property
    def terms(self) -> Terms:
        """Local prefill waits for no batch: it is its own."""
        source, sink, is_pair = self.source, self.sink, self.reason == "pair"
        return Terms(
            source.queue_s,
            source.pull_s,
            source.restore_s,
            source.prefill_s,
            self.transfer_s,
            sink.wait_s if is_pair else 0.0,
            self.itl_s,
            source.evict_s + sink.evict_s if is_pair else source.evict_s,
            source.work_s,
            self.strain_s,
        )


# What decides, in this order: crosses zones, cost, reservations.
TICK, CROSSING = 1 << 12, 1 << 60
TICKS_PER_S = 10_000  # differences below 0.1 ms are none
MOST_TICKS = CROSSING // TICK - 1


def rank_of(cost_s: float, num_reserved: int) -> int:
    """Of a candidate within one zone, the smallest is the best."""
    return int(min(cost_s * TICKS_PER_S + 0.5, MOST_TICKS)) * TICK + min(num_reserved, TICK - 1)


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
        return Candidate(one.prefill_id, one.sink.site.replica_id, lender_id, one.reason, one.terms)

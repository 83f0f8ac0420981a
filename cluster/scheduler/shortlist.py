"""The few replicas that a request is weighed between: the least loaded, and those that hold most of it. Pure."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

from cluster.scheduler.matches import Matches, Segment
from cluster.scheduler.ranked import Ranked
from cluster.scheduler.replica_view import ReplicaView

May = Callable[[ReplicaView], bool]

SMALL = 8  # replicas of a pool: all are weighed
NUM_LEAST = 6  # of the least loaded, over all buckets; two of each at least
NUM_HOLDERS = 4  # of those that match equally deep; more than that are asked in the order of load
NUM_DEPTHS = 3  # deepest matches


class Shortlist:
    """Of one pool; kept up to date by `update` and `remove`."""

    def __init__(self, ranked: Ranked, *, exhaustive: bool = False) -> None:
        """`exhaustive` takes everybody, to tell what a short list loses."""
        self.ranked = ranked
        self._exhaustive = exhaustive

    def of(self, pool: Sequence[ReplicaView], matches: Matches, may: May) -> list[ReplicaView]:
        """Those of the pool that may be taken; of a large one a few."""
        if self._exhaustive or len(pool) <= SMALL:
            return [view for view in pool if may(view)]
        if len(self.ranked) != len(pool):
            self.ranked.reset(pool)  # somebody fell silent, or nobody told
        count = max(2, NUM_LEAST // max(1, self.ranked.num_buckets))
        found = {id(view): view for view in self.ranked.least(count, may)}
        for view in self._holders(matches, may):
            found[id(view)] = view
        return list(found.values())

    def _holders(self, matches: Matches, may: May) -> Iterator[ReplicaView]:
        for segment in matches.segments[:NUM_DEPTHS]:
            if segment.numbers.bit_count() > 4 * NUM_HOLDERS:
                yield from self.ranked.least(1, partial(_holds, matches, segment, may))
            else:
                holders = self.ranked.among(matches.names(segment))
                yield from islice((view for view in holders if may(view)), NUM_HOLDERS)


def _holds(matches: Matches, segment: Segment, may: May, view: ReplicaView) -> bool:
    return matches.has(segment, view.info.replica_id) and may(view)

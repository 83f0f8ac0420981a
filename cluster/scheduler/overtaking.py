"""Who may have a plan before a request that finds no room now, in one round of plans. Pure.

Whatever it lacks, a shorter request of the same placement may lack it not; one as long does, too. Batch work, which
comes last, overtakes nobody. The first that waits beyond the time when its token is due has one replica kept for it
(Keeping), which others leave alone.
"""

from collections.abc import Collection, Mapping

from cluster.scheduler.waiting_line import Waiting

MOST_TRIED = 8  # requests of a generation that find no room
MOST_PASSED = 128  # that are as long, and left out


class _Jam:
    """Of one generation."""

    __slots__ = ("first", "least", "num_passed", "num_tried")

    def __init__(self, first: Waiting) -> None:
        self.first = first
        self.least: dict[str, int] = {}  # by placement, tokens of the shortest one that found no room
        self.num_passed = self.num_tried = 0

    @property
    def is_over(self) -> bool:
        return self.num_tried >= MOST_TRIED or self.num_passed >= MOST_PASSED


class Overtaking:
    """Of one round."""

    def __init__(self, kept: Mapping[str, tuple[str, str]]) -> None:
        """`kept`: by generation, the request that a decode replica is kept for, and the replica."""
        self._kept = kept
        self._jams: dict[str, _Jam] = {}

    def may_try(self, generation: str, waiting: Waiting) -> bool:
        """Whether it may find the room that those before it did not."""
        jam = self._jams.get(generation)
        if jam is None:
            return True
        if waiting.is_batch:
            jam.num_tried = MOST_TRIED
        if self.has_hope(generation, waiting):
            return True
        jam.num_passed += 1
        return False

    def has_hope(self, generation: str, waiting: Waiting) -> bool:
        """Whether it would be tried, and nobody as short of its placement found no room."""
        jam = self._jams.get(generation)
        if jam is None:
            return True
        least = jam.least.get(waiting.request.placement)
        return not (waiting.is_batch or jam.is_over) and (least is None or waiting.request.num_tokens < least)

    def found_no_room(self, generation: str, waiting: Waiting) -> bool:
        """Its policy has it wait. Whether it is the first of its generation."""
        jam = self._jams.setdefault(generation, _Jam(waiting))
        jam.num_tried += 1
        jam.least[waiting.request.placement] = waiting.request.num_tokens
        return jam.first is waiting

    def end(self, generation: str) -> None:
        """Nobody behind the first finds room either."""
        self._jams[generation].num_tried = MOST_TRIED

    def kept_id(self, generation: str, waiting: Waiting) -> str:
        """The decode replica that this one leaves alone; empty: none."""
        request_id, replica_id = self._kept.get(generation, ("", ""))
        return "" if request_id == waiting.request.request_id else replica_id

    def firsts(self) -> Mapping[str, Waiting]:
        """By generation, the first that found no room."""
        return {generation: jam.first for generation, jam in self._jams.items()}

    def is_over(self, generations: Collection[str]) -> bool:
        """Nobody more of these is tried."""
        return len(self._jams) == len(generations) and all(jam.is_over for jam in self._jams.values())

"""How deep each replica's cache matches one prompt: a mapping that is computed as far as it is asked. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cluster.scheduler.holders import Holders


class Segment(NamedTuple):
    """Replicas that match exactly so many leading blocks."""

    depth: int
    numbers: int  # bit i: replica number i


class Run(NamedTuple):
    """Consecutive blocks of one KV group with the same holders; `start` counts from 0."""

    group: int
    start: int
    length: int
    holders: Holders


class Matches(Mapping[str, int]):
    """Replica id -> leading blocks that it need not compute; replicas without any are left out."""

    def __init__(
        self,
        segments: Sequence[Segment],
        runs: Iterable[Run],
        numbers: Mapping[str, int],
        names: Sequence[str],
    ) -> None:
        """`segments` are disjoint. `numbers` of the replicas, and their `names` by number, are the index's own."""
        self.segments = sorted(segments, reverse=True)
        self._below = [run for run in runs if len(run.holders.planes) > 1]
        self.has_below = bool(self._below)  # some replica has some of these blocks below its device alone
        self._numbers = numbers
        self._names = names

    def __getitem__(self, replica_id: str) -> int:
        number = self._numbers[replica_id]
        for depth, numbers in self.segments:
            if numbers >> number & 1:
                return depth
        raise KeyError(replica_id)

    def __iter__(self) -> Iterator[str]:
        return (name for segment in self.segments for name in self.names(segment))

    def __len__(self) -> int:
        return sum(segment.numbers.bit_count() for segment in self.segments)

    def depth(self, replica_id: str) -> int:
        """0 of one without any."""
        if not self.segments:
            return 0
        number = self._numbers.get(replica_id)
        if number is None:
            return 0
        for depth, numbers in self.segments:
            if numbers >> number & 1:
                return depth
        return 0

    def is_of(self, replica_id: str, numbers: int) -> bool:
        """Whether a replica's number is among these bits."""
        number = self._numbers.get(replica_id)
        return number is not None and bool(numbers >> number & 1)

    def names(self, segment: Segment) -> Iterator[str]:
        """Ids of a segment's replicas."""
        rest = segment.numbers
        while rest:
            lowest = rest & -rest
            yield self._names[lowest.bit_length() - 1]
            rest ^= lowest

    def num_below(self, replica_id: str, depth: int, reaches: Sequence[int | None]) -> dict[int, int]:
        """Blocks that a replica needs of the first `depth` and has below its device alone, by tier, over KV groups."""
        found: dict[int, int] = {}
        if not self._below or not depth:
            return found
        number = self._numbers[replica_id]
        for run in self._below:
            reach = reaches[run.group] if run.group < len(reaches) else 0
            first = run.start if reach is None else max(run.start, depth - reach)
            count = min(run.start + run.length, depth) - first
            for tier, plane in enumerate(run.holders.planes[1:], start=1):
                if count > 0 and plane >> number & 1:
                    found[tier] = found.get(tier, 0) + count
        return found


NO_MATCHES = Matches((), (), {}, ())

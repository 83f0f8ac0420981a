"""Who caches which prefix: key of a block (hash and KV group) -> set of holders, by tier. Pure.

Per block there are its key, one entry of a dictionary and 16 bytes per holder; sets of holders are shared, see
holders.py.
"""

from collections.abc import Iterable, Mapping, Sequence

from cluster.scheduler.depths import Reaches, by_windows, nested
from cluster.scheduler.holders import Holders, HolderSets
from cluster.scheduler.key_log import KeyLog
from cluster.scheduler.matches import Matches, Run, Segment
from core.block_hash import BlockHash, BlockKey, in_group

PIECE = 64  # blocks looked up at a time, so that what follows the end of a match costs little
SLACK = 1024  # keys in a replica's log beyond twice those that it holds


class _Replica:
    """`keys` are all that it holds; those that it held once may be among them, and some twice."""

    __slots__ = ("keys", "num_held", "number", "reaches")

    def __init__(self, number: int, reaches: Reaches) -> None:
        self.number = number
        self.reaches = reaches
        self.keys = KeyLog()
        self.num_held = 0


class PrefixIndex:
    """Exact as of the last report; removing a replica costs time proportional to what it held."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, Holders] = {}
        self._sets = HolderSets()
        self._replicas: dict[str, _Replica] = {}
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []  # by number
        self._free_numbers: list[int] = []
        self._alike: dict[Reaches, int] = {}  # numbers of the replicas with these reaches, as bits

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def blocks(self) -> Mapping[BlockKey, Holders]:
        """All that somebody holds."""
        return self._holders

    def held_by(self, replica_id: str) -> set[BlockKey]:
        """Blocks that a replica holds in some tier."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return set()
        bit = 1 << replica.number
        return {key for key in replica.keys if (found := self._holders.get(key)) is not None and found.everyone & bit}

    def num_held(self, replica_id: str) -> int:
        """How many those are."""
        replica = self._replicas.get(replica_id)
        return replica.num_held if replica is not None else 0

    @property
    def num_sets(self) -> int:
        """Different sets of holders."""
        return len(self._sets)

    def store(self, replica_id: str, keys: Sequence[BlockKey], reaches: Reaches = (None,), tiers: bytes = b"") -> None:
        """The replica now caches these blocks, too; `reaches`, always the same, say which of a prefix it needs.

        `tiers`: of each, the fastest one that holds it, 0 being the device; empty: the device holds all.
        """
        if not keys:
            return
        replica = self._replicas.get(replica_id) or self._enter(replica_id, reaches)
        if not tiers.strip(b"\0"):
            self._store_in(replica, keys, 0)
            return
        for tier in set(tiers):
            self._store_in(replica, [key for key, found in zip(keys, tiers, strict=True) if found == tier], tier)

    def remove(self, replica_id: str, keys: Iterable[BlockKey]) -> None:
        """The replica caches these blocks no more; unknown ones are ignored."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.num_held -= self._remove(replica.number, keys)
            if len(replica.keys) > 2 * replica.num_held + SLACK:
                held = self.held_by(replica_id)
                replica.keys = KeyLog()
                replica.keys.add(tuple(held))

    def remove_replica(self, replica_id: str) -> None:
        """Forgets all that a replica held."""
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return
        self._remove(replica.number, replica.keys)
        self._alike[replica.reaches] &= ~(1 << replica.number)
        if not self._alike[replica.reaches]:
            del self._alike[replica.reaches]
        del self._numbers[replica_id]
        self._free_numbers.append(replica.number)

    def match(self, hashes: Sequence[BlockHash]) -> Matches:
        """How many leading blocks each replica need not compute.

        What core.kv_groups.deepest_prefix says of each one's cache, for all replicas in one pass.
        """
        segments: list[Segment] = []
        runs: dict[tuple[int, int], Run] = {}
        for reaches, alike in self._alike.items():
            groups = [self._runs(hashes, n, alike if reach is None else 0) for n, reach in enumerate(reaches)]
            if reaches == (None,):
                segments += nested(groups[0], alike)
                if len(self._alike) == 1:
                    return Matches(segments, groups[0], self._numbers, self._names)
            elif all(groups):
                segments += by_windows(groups, reaches, alike, len(hashes))
            for run in (run for group in groups for run in group):
                known = runs.get((run.group, run.start))
                if known is None or known.length < run.length:  # some stop where nobody of theirs goes on
                    runs[run.group, run.start] = run
        return Matches(segments, runs.values(), self._numbers, self._names)

    def _runs(self, hashes: Sequence[BlockHash], group: int, alike: int) -> list[Run]:
        """Of blocks that somebody holds. With `alike`, only as far as one of those holds all up to there."""
        runs: list[Run] = []
        get, alive = self._holders.get, alike
        for start in range(0, len(hashes), PIECE):
            piece = hashes[start : start + PIECE]
            found = list(map(get, piece if not group else [in_group(one, group) for one in piece]))
            first, last = 0, len(found)
            while first < last:
                holders = found[first]
                end = first + 1
                while end < last and found[end] is holders:
                    end += 1
                if holders is not None:
                    runs.append(Run(group, start + first, end - first, holders))
                if alike:
                    alive &= holders.everyone if holders is not None else 0
                    if not alive:
                        return runs
                first = end
        return runs

    def _store_in(self, replica: _Replica, keys: Sequence[BlockKey], tier: int) -> None:
        """The hot loop of events: neighbours mostly come from one set and go to one."""
        blocks, number, bit, with_one = self._holders, replica.number, 1 << replica.number, self._sets.with_one
        get, num_held = blocks.get, replica.num_held
        before: Holders | None = None
        after = with_one(None, number, tier)
        is_new = True
        fresh: list[BlockKey] = []
        for key in keys:
            holders = get(key)
            if holders is not before:
                before = holders
                after = with_one(holders, number, tier)
                is_new = holders is None or not holders.everyone & bit
            if is_new:
                fresh.append(key)
            blocks[key] = after
        # a key that comes twice among `keys` was new once
        replica.num_held = num_held + len(fresh)
        replica.keys.add(fresh)

    def _remove(self, number: int, keys: Iterable[BlockKey]) -> int:
        """How many of them it held."""
        blocks, bit, without = self._holders, 1 << number, self._sets.without
        get = blocks.get
        before: Holders | None = None
        after: Holders | None = None
        num_removed = 0
        for key in keys:
            holders = get(key)
            if holders is None or not holders.everyone & bit:
                continue
            if holders is not before:
                before, after = holders, without(holders, number)
            num_removed += 1
            if after is None:
                del blocks[key]
            else:
                blocks[key] = after
        return num_removed

    def _enter(self, replica_id: str, reaches: Reaches) -> _Replica:
        if self._free_numbers:
            number = self._free_numbers.pop()
            self._names[number] = replica_id
        else:
            number = len(self._names)
            self._names.append(replica_id)
        replica = self._replicas[replica_id] = _Replica(number, reaches)
        self._numbers[replica_id] = number
        self._alike[reaches] = self._alike.get(reaches, 0) | 1 << number
        return replica

"""Replicas in the order of their load, so that the least loaded are found without looking at all. Pure.

They stand in buckets of alike ones (zone, what they can pair with, speed): within a bucket the load alone decides.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice

from cluster.scheduler.replica_view import ReplicaView

Entry = tuple[float, int, str]  # load in seconds, reservations, id: equal ones fill evenly, and always alike


class Ranked:
    """Of one role and generation."""

    def __init__(self, bucket: Callable[[ReplicaView], Hashable], load_s: Callable[[ReplicaView], float]) -> None:
        self._bucket = bucket
        self._load_s = load_s
        self._views: dict[str, ReplicaView] = {}
        self._places: dict[str, tuple[Hashable, Entry]] = {}
        self._buckets: dict[Hashable, list[Entry]] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_buckets(self) -> int:
        """Those that hold a replica."""
        return len(self._buckets)

    def update(self, view: ReplicaView) -> None:
        """Its load, or who it is, has changed; a new one enters, one that takes no work leaves."""
        replica_id = view.info.replica_id
        self.remove(replica_id)
        if not view.usable:
            return
        bucket, entry = self._bucket(view), (round(self._load_s(view), 4), view.num_reservations, replica_id)
        self._views[replica_id] = view
        self._places[replica_id] = bucket, entry
        insort(self._buckets.setdefault(bucket, []), entry)

    def remove(self, replica_id: str) -> None:
        """It is gone; idempotent."""
        known = self._places.pop(replica_id, None)
        if known is None:
            return
        del self._views[replica_id]
        bucket, entry = known
        entries = self._buckets[bucket]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self._buckets[bucket]

    def reset(self, views: Iterable[ReplicaView]) -> None:
        """These and no others."""
        for replica_id in list(self._places):
            self.remove(replica_id)
        for view in views:
            self.update(view)

    def least(self, count: int, may: Callable[[ReplicaView], bool]) -> list[ReplicaView]:
        """Of each bucket the `count` least loaded that are usable and may be taken."""
        views = self._views
        found: list[ReplicaView] = []
        for entries in self._buckets.values():
            able = (view for _, _, replica_id in entries if (view := views[replica_id]).usable and may(view))
            found += islice(able, count)
        return found

    def among(self, replica_ids: Iterable[str]) -> Iterator[ReplicaView]:
        """Those of the given ones that are here and usable."""
        views = self._views
        return (view for replica_id in replica_ids if (view := views.get(replica_id)) is not None and view.usable)

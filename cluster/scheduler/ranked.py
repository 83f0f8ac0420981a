"""Replicas in the order of their load, so that the least loaded are found without looking at all. Pure.

They stand in buckets of alike ones (zone, what they can pair with, speed): within a bucket the load alone decides. A
queue gets shorter while nobody tells: loads of those that have one count from the beginning of the clock, so that their
order holds while time goes by.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

from cluster.scheduler.site import Site

Kind = tuple[str, int, *tuple[int, ...]]  # zone, kind, paces
Entry = tuple[float, int, str, Site]  # load in seconds, reservations, id: equal ones fill evenly, and always alike


class Bucket:
    """Alike ones."""

    __slots__ = ("idle", "queued")

    def __init__(self) -> None:
        self.idle: list[Entry] = []  # or late with the last of their prompts
        self.queued: list[Entry] = []  # with prompts to compute, at least when they were heard of last

    def least(self, number: int, may: Callable[[Site], bool], now: float, found: list[Entry]) -> None:
        """Adds the least loaded of those that may be taken, up to so many, the least loaded first."""
        idle, queued = self.idle, self.queued
        num_idle, num_queued, place, place_queued = len(idle), len(queued), 0, 0
        waiting = _at(queued[0], now) if num_queued else None
        while number and (place < num_idle or waiting is not None):
            if waiting is not None and (place == num_idle or waiting[0] < idle[place][0]):
                entry = waiting
                place_queued += 1
                waiting = _at(queued[place_queued], now) if place_queued < num_queued else None
            else:
                entry = idle[place]
                place += 1
            if may(entry[3]):
                found.append(entry)
                number -= 1


class Ranked:
    """Of one role and generation."""

    def __init__(self) -> None:
        self.buckets: dict[Kind, Bucket] = {}
        self._places: dict[str, tuple[Kind, bool, Entry]] = {}  # whether it has a queue

    def __len__(self) -> int:
        return len(self._places)

    def place(self, site: Site, kind: Kind, load_s: float) -> None:
        """Enters, or moves to where it belongs now; one that takes no work leaves. `load_s`: beside its queue."""
        self.remove(site.replica_id)
        if site.view.usable:
            bucket = self.buckets.get(kind)
            if bucket is None:
                bucket = self.buckets[kind] = Bucket()
            is_queued = site.queue_s > 0
            if is_queued:
                load_s += site.begun_at + site.queue_s
            entry = (load_s if is_queued else round(load_s, 4), site.num_reserved, site.replica_id, site)
            self._places[site.replica_id] = kind, is_queued, entry
            insort(bucket.queued if is_queued else bucket.idle, entry)

    def settle(self, bucket: Bucket, now: float) -> None:
        """Those whose queue should be over stand among those without one."""
        while bucket.queued:
            site = bucket.queued[0][3]
            if now < site.begun_at + site.queue_s:
                return
            entry = _at(bucket.queued.pop(0), now)
            self._places[site.replica_id] = self._places[site.replica_id][0], False, entry
            insort(bucket.idle, entry)

    def remove(self, replica_id: str) -> None:
        """It is gone; idempotent."""
        known = self._places.pop(replica_id, None)
        if known is None:
            return
        kind, is_queued, entry = known
        bucket = self.buckets[kind]
        entries = bucket.queued if is_queued else bucket.idle
        del entries[bisect_left(entries, entry)]
        if not bucket.idle and not bucket.queued:
            del self.buckets[kind]

    def clear(self) -> None:
        """Nobody is here."""
        self._places.clear()
        self.buckets.clear()

    def among(self, replica_ids: Iterable[str], now: float) -> list[Site]:
        """Those of the given ones that are here, in the order of their load."""
        found = []
        for replica_id in replica_ids:
            if (known := self._places.get(replica_id)) is not None:
                _, is_queued, entry = known
                found.append(_at(entry, now) if is_queued else entry)
        return [entry[3] for entry in sorted(found)]


def _at(queued: Entry, now: float) -> Entry:
    """With its load at this moment. A queue that should be over is as good as over."""
    load_s, num_reserved, replica_id, site = queued
    ends_at = site.begun_at + site.queue_s
    return round(load_s - (now if now < ends_at else ends_at), 4), num_reserved, replica_id, site

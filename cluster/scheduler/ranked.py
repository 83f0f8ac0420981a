"""Replicas in the order of their load, so that the least loaded are found without looking at all. Pure.

They stand in buckets of alike ones (zone, what they can pair with, whether prompts wait there, speed): within a bucket
the load alone decides. A queue gets shorter while nobody tells: where there is one, the load counts from the beginning
of the clock, so that the order holds while time goes by.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from cluster.scheduler.site import Site

Bucket = tuple[str, int, bool, *tuple[int, ...]]  # zone, kind, whether it has a queue, paces
Entry = tuple[float, int, str, Site]  # load in seconds, reservations, id: equal ones fill evenly, and always alike


class Ranked:
    """Of one role and generation."""

    def __init__(self) -> None:
        self.buckets: dict[Bucket, list[Entry]] = {}
        self._places: dict[str, tuple[Bucket, Entry]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def place(self, site: Site, bucket: Bucket, load_s: float) -> None:
        """Enters, or moves to where it belongs now; one that takes no work leaves."""
        self.remove(site.replica_id)
        if site.view.usable:
            entry = (round(load_s, 4), site.num_reserved, site.replica_id, site)
            self._places[site.replica_id] = bucket, entry
            insort(self.buckets.setdefault(bucket, []), entry)

    def remove(self, replica_id: str) -> None:
        """It is gone; idempotent."""
        known = self._places.pop(replica_id, None)
        if known is not None:
            bucket, entry = known
            entries = self.buckets[bucket]
            del entries[bisect_left(entries, entry)]
            if not entries:
                del self.buckets[bucket]

    def clear(self) -> None:
        """Nobody is here."""
        self._places.clear()
        self.buckets.clear()

    def among(self, replica_ids: Iterable[str], now: float) -> list[Site]:
        """Those of the given ones that are here, in the order of their load."""
        places = self._places
        found = [at(*known, now) for replica_id in replica_ids if (known := places.get(replica_id)) is not None]
        return [entry[3] for entry in sorted(found)]


def at(bucket: Bucket, entry: Entry, now: float) -> Entry:
    """With its load at this moment. A queue that should be over is as good as over."""
    if not bucket[2]:
        return entry
    load_s, num_reserved, replica_id, site = entry
    ends_at = site.begun_at + site.queue_s
    return load_s - min(now, ends_at), num_reserved, replica_id, site

"""The few replicas that a request is weighed between: the least loaded, and those that hold most of it. Pure."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import log

from cluster.scheduler.matches import Matches
from cluster.scheduler.ranked import Ranked
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.site import Site, Sites
from core.messages.fleet import Role

May = Callable[[Site], bool]

SMALL = 6  # replicas of a pool: all are weighed
NUM_LEAST = 4  # of the least loaded, over all buckets; two of each at least
NUM_HOLDERS = 3  # of those that match equally deep
FEW_HOLDERS = 16  # of those that match equally deep: up to so many are looked at all
NUM_DEPTHS = 2  # deepest matches
SPEED_STEP = 0.05  # of the logarithm of a replica's pace: within it the load alone ranks replicas


class Shortlist:
    """Of one pool."""

    def __init__(self, sites: Sites, *, exhaustive: bool = False) -> None:
        """`exhaustive` takes everybody, to tell what a short list loses."""
        self._sites = sites
        self._exhaustive = exhaustive
        self._ranked = Ranked()

    def changed(self, site: Site) -> None:
        """Its load has."""
        is_prefill = site.info.role is Role.PREFILL
        paces_s = (site.costs.token_s,) if is_prefill else (site.costs.token_s, site.costs.step_s)
        bucket = site.zone, site.kind, *(round(log(max(pace_s, 1e-9)) / SPEED_STEP) for pace_s in paces_s)
        # a decode replica that prefills has its batch wait, and what it shall prefill next
        self._ranked.place(site, bucket, site.queue_s if is_prefill else site.itl_s + site.queue_s)

    def remove(self, replica_id: str) -> None:
        """It is gone; idempotent."""
        self._ranked.remove(replica_id)

    def of(self, pool: Sequence[ReplicaView], matches: Matches, may: May) -> list[Site]:
        """Those of the pool that may be taken; of a large one a few."""
        if self._exhaustive or len(pool) <= SMALL:
            return [site for site in map(self._sites.of, pool) if may(site)]
        if len(self._ranked) != len(pool):  # somebody fell silent, or nobody told
            self._ranked.clear()
            for view in pool:
                self.changed(self._sites.of(view))
        found: dict[str, Site] = {}
        buckets = self._ranked.buckets
        count = max(2, NUM_LEAST // len(buckets))
        for entries in buckets.values():
            num_left = count
            for entry in entries:
                site = entry[3]
                if may(site):
                    found[entry[2]] = site
                    num_left -= 1
                    if not num_left:
                        break
        for segment in matches.segments[:NUM_DEPTHS]:
            if segment.numbers.bit_count() > FEW_HOLDERS:
                holders = self._by_load(matches, segment.numbers)
            else:
                holders = iter(self._ranked.among(matches.names(segment)))
            for site in islice(filter(may, holders), NUM_HOLDERS):
                found[site.replica_id] = site
        return list(found.values())

    def _by_load(self, matches: Matches, numbers: int) -> Iterator[Site]:
        """Holders, where there are many: found by the way."""
        for entries in self._ranked.buckets.values():
            for entry in entries:
                if matches.is_of(entry[2], numbers):
                    yield entry[3]

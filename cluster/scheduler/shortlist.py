"""The few replicas that a request is weighed between: the least loaded, and those that hold most of it. Pure."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import log

from cluster.scheduler.matches import Matches, Segment
from cluster.scheduler.policy import Choices
from cluster.scheduler.ranked import Entry, Kind, Ranked
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import without
from cluster.scheduler.site import Site, Sites
from core.messages.fleet import Role
from core.messages.to_scheduler import Reserve

May = Callable[[Site], bool]

SMALL = 6  # replicas of a pool: all are weighed
NUM_LEAST = 5  # of the least loaded of each zone
NUM_BY_LOAD = 3  # of these, for their load alone
NUM_OF_ONLY = 8  # the same, of an only pool
OF_BUCKET = 2  # that are looked at, the least loaded ones; of many buckets, of each the least loaded alone
FEW_BUCKETS = 4
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
        paces = (round(log(max(pace_s, 1e-9)) / SPEED_STEP) for pace_s in paces_s)
        kind: Kind = (site.zone, site.kind, *paces)
        # a decode replica that prefills has its batch wait, and what it shall prefill next
        self._ranked.place(site, kind, 0.0 if is_prefill else site.step_s + site.strain_s)

    def remove(self, replica_id: str) -> None:
        """It is gone; idempotent."""
        self._ranked.remove(replica_id)

    def of(
        self,
        pool: Sequence[ReplicaView],
        num_tokens: int,
        matches: Matches,
        may: May,
        now: float,
        *,
        is_only: bool = False,
    ) -> list[Site]:
        """Those of the pool that may be taken for a prompt of so many tokens; of a large one a few, and more where it
        `is_only` this one: what a prompt is to a batch beside it no load tells.
        """
        if self._exhaustive or len(pool) <= SMALL:
            return [site for site in map(self._sites.of, pool) if may(site)]
        if len(self._ranked) != len(pool):  # somebody fell silent, or nobody told
            self._ranked.clear()
            for view in pool:
                self.changed(self._sites.of(view))
        found = {site.replica_id: site for site in self._least(num_tokens, may, now, is_only=is_only)}
        for segment in matches.segments[:NUM_DEPTHS]:
            for site in self._holders(matches, segment, may, now):
                found[site.replica_id] = site
        return list(found.values())

    def _least(self, num_tokens: int, may: May, now: float, *, is_only: bool) -> list[Site]:
        """Of each zone: by load alone, and by load and what the prompt takes at the replica's pace."""
        zones: dict[str, list[Entry]] = {}
        buckets = self._ranked.buckets
        most = NUM_OF_ONLY if is_only else NUM_LEAST
        num_of_bucket = (most if is_only else OF_BUCKET) if len(buckets) <= FEW_BUCKETS else 1
        for kind, bucket in buckets.items():
            self._ranked.settle(bucket, now)
            bucket.least(num_of_bucket, may, now, zones.setdefault(kind[0], []))
        least: list[Site] = []
        for heads in zones.values():
            if len(heads) > most:
                heads.sort()
                timed = sorted([(entry[0] + num_tokens * entry[3].costs.token_s, entry) for entry in heads])
                least += [entry[3] for entry in heads[:NUM_BY_LOAD]]
                least += [entry[3] for _, entry in timed[: NUM_LEAST - NUM_BY_LOAD]]
            else:
                least += [entry[3] for entry in heads]
        return least

    def _holders(self, matches: Matches, segment: Segment, may: May, now: float) -> list[Site]:
        """The least loaded of those that match so deep; where they are many, those found by the way."""
        if segment.numbers.bit_count() <= FEW_HOLDERS:
            return list(islice(filter(may, self._ranked.among(matches.names(segment), now)), NUM_HOLDERS))
        found: list[Site] = []
        for bucket in self._ranked.buckets.values():
            for entries in (bucket.idle, bucket.queued):
                for entry in entries:
                    if matches.is_of(entry[2], segment.numbers) and may(entry[3]):
                        found.append(entry[3])
                        if len(found) == NUM_HOLDERS:
                            return found
        return found


class Shortlists:
    """Of all pools."""

    def __init__(self, sites: Sites, *, exhaustive: bool) -> None:
        """`exhaustive`: see Shortlist."""
        self._sites = sites
        self._exhaustive = exhaustive
        self._of_pools: dict[tuple[Role, str], Shortlist] = {}

    def of(
        self, pool: Sequence[ReplicaView], request: Reserve, choices: Choices, coming: Mapping[str, int], may: May
    ) -> list[Site]:
        """Of one pool, for a request; `coming`: by replica, how much of the prompt is being computed there."""
        if request.avoid:  # rare: a short list knows of nobody's failures
            return [site for site in map(self._sites.of, without(pool, request.avoid)) if may(site)]
        is_only = not choices.prefills
        shortlist = self._of_pool(pool[0])
        short = shortlist.of(pool, request.num_tokens, choices.cached, may, choices.now, is_only=is_only)
        if coming and len(short) < len(pool):
            role, generation = pool[0].info.role, pool[0].info.generation
            found = {site.replica_id for site in short}
            for replica_id in coming:
                site = self._sites.find(replica_id) if replica_id not in found else None
                if site and (site.info.role, site.info.generation) == (role, generation) and may(site):
                    short.append(site)
        return short

    def changed(self, site: Site) -> None:
        """Its load has."""
        self._of_pool(site.view).changed(site)

    def remove(self, replica_id: str) -> None:
        """It is gone; idempotent."""
        for shortlist in self._of_pools.values():
            shortlist.remove(replica_id)

    def _of_pool(self, view: ReplicaView) -> Shortlist:
        key = view.info.role, view.info.generation
        shortlist = self._of_pools.get(key)
        if shortlist is None:
            shortlist = self._of_pools[key] = Shortlist(self._sites, exhaustive=self._exhaustive)
        return shortlist

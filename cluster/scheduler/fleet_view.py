"""What the scheduler knows of the fleet: who lives and takes new work, kept up to date as reports come. Pure."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import ReplicaStatus


class Pool:
    """Replicas of one role and generation that take work, in the order in which they came."""

    def __init__(self) -> None:
        self.replicas: list[ReplicaView] = []
        self._longest: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that one of them can hold."""
        if self._longest is None:
            self._longest = max(replica.info.max_model_len for replica in self.replicas)
        return self._longest

    def add(self, replica: ReplicaView) -> None:
        """A new list, so that those who were given the old one may keep it."""
        self.replicas = [*self.replicas, replica]
        self._longest = None

    def remove(self, replica: ReplicaView) -> None:
        """As `add`."""
        self.replicas = [other for other in self.replicas if other is not replica]
        self._longest = None


class FleetView:
    """All replicas; a call costs time in proportion to what has changed since the last one, not to their number."""

    def __init__(self, replica_timeout_s: float) -> None:
        self._timeout_s = replica_timeout_s
        self._replicas: dict[str, ReplicaView] = {}
        self._heard: OrderedDict[str, ReplicaView] = OrderedDict()  # within the timeout, the longest silent first
        self._pools: dict[Role, dict[str, Pool]] = {role: {} for role in Role}

    def __iter__(self) -> Iterator[ReplicaView]:
        return iter(self._replicas.values())

    @property
    def by_id(self) -> Mapping[str, ReplicaView]:
        """All of them, as they change."""
        return self._replicas

    def get(self, replica_id: str) -> ReplicaView | None:
        """The replica, reachable or not."""
        return self._replicas.get(replica_id)

    def update(self, info: ReplicaInfo, status: ReplicaStatus, now: float) -> bool:
        """Takes a report in; True when it comes from a new replica or incarnation."""
        replica = self._replicas.get(info.replica_id)
        is_new = replica is None or replica.info.incarnation != info.incarnation
        if replica is None or is_new:
            self.remove(info.replica_id)
            replica = self._replicas[info.replica_id] = ReplicaView(info, status, now)
        elif replica.info == info:
            info = replica.info  # one object for all its life, so that what is kept by it is found fast
        else:
            self._set_usable(replica, False)
        replica.hear(info, status, now)
        self._heard[info.replica_id] = replica
        self._heard.move_to_end(info.replica_id)
        self._set_usable(replica, not status.draining)
        return is_new

    def remove(self, replica_id: str) -> None:
        """The replica is gone."""
        replica = self._replicas.pop(replica_id, None)
        self._heard.pop(replica_id, None)
        if replica is not None:
            self._set_usable(replica, False)

    def usable(self, role: Role, now: float) -> list[ReplicaView]:
        """Replicas of a role that live and take new work."""
        return [replica for pool in self.pools(role, now).values() for replica in pool.replicas]

    def in_generation(self, role: Role, generation: str, now: float) -> Sequence[ReplicaView]:
        """Those of one generation; the list never changes."""
        pool = self.pools(role, now).get(generation)
        return pool.replicas if pool is not None else ()

    def pools(self, role: Role, now: float) -> Mapping[str, Pool]:
        """By generation, those without a replica left out."""
        self._drop_silent(now)
        return self._pools[role]

    def _drop_silent(self, now: float) -> None:
        while self._heard:
            replica_id, replica = next(iter(self._heard.items()))
            if now - replica.seen_at <= self._timeout_s:
                return
            del self._heard[replica_id]
            self._set_usable(replica, False)

    def _set_usable(self, replica: ReplicaView, usable: bool) -> None:
        """The one place where pools change."""
        if replica.usable is usable:
            return
        replica.usable = usable
        info = replica.info
        pools = self._pools[info.role]
        if usable:
            pools.setdefault(info.generation, Pool()).add(replica)
            return
        pools[info.generation].remove(replica)
        if not pools[info.generation].replicas:
            del pools[info.generation]

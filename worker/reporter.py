"""Reports a replica's load and prefix-cache changes to whoever watches; each watcher gets a snapshot first."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from core.block_hash import BlockKey
from core.messages.fleet import ReplicaInfo
from core.messages.to_scheduler import ReplicaStatus, Report, Watch
from engine.block_pool import BlockPool
from engine.kv_tiers import KVTiers

INTERVAL_S = 0.05
QUIET_INTERVAL_S = 0.5  # between reports when nothing changed


@dataclass
class _Watcher:
    stored: set[BlockKey] = field(default_factory=set)
    removed: set[BlockKey] = field(default_factory=set)


class Reporter:
    """One per replica, on its first rank."""

    def __init__(self, info: ReplicaInfo, pool: BlockPool, tiers: KVTiers, status: Callable[[], ReplicaStatus]) -> None:
        """What a tier has counts as cached: it comes back when it is wanted."""
        self._info = info
        self._pool = pool
        self._tiers = tiers
        self._status = status
        self._watchers: dict[str, _Watcher] = {}

    async def watch(self, message: Watch) -> AsyncIterator[Report]:
        """Yields reports until the watcher leaves or watches anew."""
        self._collect_events()
        watcher = self._watchers[message.watcher_id] = _Watcher()
        clock = time.monotonic
        status, reported_at, sequence = self._status(), clock(), 0
        cached = {*self._pool.snapshot(), *self._tiers.snapshot()}
        yield Report(self._info, sequence, True, status, tuple(cached), ())
        try:
            while self._watchers.get(message.watcher_id) is watcher:
                await asyncio.sleep(INTERVAL_S)
                self._collect_events()
                changed = self._status() != status or watcher.stored or watcher.removed
                if changed or clock() - reported_at >= QUIET_INTERVAL_S:
                    status, reported_at, sequence = self._status(), clock(), sequence + 1
                    stored, removed = tuple(watcher.stored), tuple(watcher.removed)
                    watcher.stored, watcher.removed = set(), set()
                    yield Report(self._info, sequence, False, status, stored, removed)
        finally:
            if self._watchers.get(message.watcher_id) is watcher:
                del self._watchers[message.watcher_id]

    def _collect_events(self) -> None:
        stored, removed = self._pool.drain_events()
        changed = self._tiers.drain_changed().union(stored, removed)
        present = {name for name in changed if name in self._pool or self._tiers.holds(name)}
        for watcher in self._watchers.values():
            watcher.stored = (watcher.stored - changed) | present
            watcher.removed = (watcher.removed | changed) - present

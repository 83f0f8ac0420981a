"""Reports a replica's load and prefix-cache changes to whoever watches; each watcher gets a snapshot first."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from core.block_hash import BlockKey
from core.messages.fleet import ReplicaInfo
from core.messages.to_scheduler import ReplicaStatus, Report, Watch
from engine.block_pool import BlockPool
from engine.kv_tiers import DEVICE, KVTiers
from worker.samples import Samples

INTERVAL_S = 0.05
QUIET_INTERVAL_S = 0.5  # between reports when nothing changed


@dataclass
class _Watcher:
    stored: dict[BlockKey, int] = field(default_factory=dict)  # the fastest tier that holds it
    removed: set[BlockKey] = field(default_factory=set)


class Reporter:
    """One per replica, on its first rank."""

    def __init__(
        self,
        info: ReplicaInfo,
        pool: BlockPool,
        tiers: KVTiers,
        status: Callable[[], ReplicaStatus],
        samples: Samples,
    ) -> None:
        """What a tier has counts as cached: it comes back when it is wanted."""
        self._info = info
        self._pool = pool
        self._tiers = tiers
        self._status = status
        self._samples = samples
        self._watchers: dict[str, _Watcher] = {}

    async def watch(self, message: Watch) -> AsyncIterator[Report]:
        """Yields reports until the watcher leaves or watches anew."""
        self._collect_events()
        watcher = self._watchers[message.watcher_id] = _Watcher()
        clock = time.monotonic
        status, reported_at, sequence = self._status(), clock(), 0
        num_steps, num_transfers = self._samples.steps.num_seen, self._samples.transfers.num_seen
        cached = self._present((*self._pool.snapshot(), *self._tiers.snapshot()))
        yield Report(self._info, sequence, True, status, tuple(cached), (), _places(cached))
        try:
            while self._watchers.get(message.watcher_id) is watcher:
                await asyncio.sleep(INTERVAL_S)
                self._collect_events()
                changed = self._status() != status or watcher.stored or watcher.removed
                if changed or clock() - reported_at >= QUIET_INTERVAL_S:
                    status, reported_at, sequence = self._status(), clock(), sequence + 1
                    stored, removed = watcher.stored, tuple(watcher.removed)
                    steps, transfers = (
                        self._samples.steps.since(num_steps),
                        self._samples.transfers.since(num_transfers),
                    )
                    num_steps, num_transfers = self._samples.steps.num_seen, self._samples.transfers.num_seen
                    watcher.stored, watcher.removed = {}, set()
                    yield Report(
                        self._info, sequence, False, status, tuple(stored), removed, _places(stored), steps, transfers
                    )
        finally:
            if self._watchers.get(message.watcher_id) is watcher:
                del self._watchers[message.watcher_id]

    def _collect_events(self) -> None:
        stored, removed = self._pool.drain_events()
        changed = self._tiers.drain_changed().union(stored, removed)
        present = self._present(changed)
        for watcher in self._watchers.values():
            watcher.stored = {key: tier for key, tier in watcher.stored.items() if key not in changed} | present
            watcher.removed = (watcher.removed | changed) - present.keys()

    def _present(self, keys: Iterable[BlockKey]) -> dict[BlockKey, int]:
        """The fastest tier of those that some tier has."""
        places = ((key, DEVICE if key in self._pool else self._tiers.place(key)) for key in keys)
        return {key: tier for key, tier in places if tier is not None}


def _places(stored: dict[BlockKey, int]) -> bytes:
    """As Report says: empty when the device has all."""
    return bytes(stored.values()) if any(stored.values()) else b""

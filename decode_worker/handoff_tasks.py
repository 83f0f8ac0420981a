"""Carries out what the books of handoffs ask for, one task each, and tells ingresses what it means for them."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from core.errors import BatonError
from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import TokenEvent
from core.telemetry import request_id_var
from decode_worker import token_events
from decode_worker.handoff import Fetch, Handoff
from decode_worker.handoffs import Handoffs
from decode_worker.outbox import Outbox
from decode_worker.sources import Sources
from kv_transfer.timeline import Timeline
from worker.drainer import Drainer

logger = logging.getLogger(__name__)


class HandoffTasks:
    """Belongs to one event loop."""

    def __init__(
        self,
        handoffs: Handoffs,
        sources: Sources,
        outbox: Outbox,
        timeline: Timeline,
        drainer: Drainer,
        wake: Callable[[], None],
    ) -> None:
        """`wake`: something may have become runnable."""
        self._handoffs = handoffs
        self._sources = sources
        self._outbox = outbox
        self._timeline = timeline
        self._drainer = drainer
        self._wake = wake
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def prepare(self, source: ReplicaInfo) -> None:
        """Makes channels from a source ahead of the first fetch."""
        self._spawn(self._sources.prepare(source))

    def fetch(self, fetch: Fetch) -> None:
        """Brings announced blocks."""
        self._spawn(self._fetch(fetch))

    def settle(self) -> None:
        """After any change: releases what prefill may free, tells ingresses what joined, wakes loop and drain."""
        for handoff in self._handoffs.take_owed():
            self._spawn(self._borrow_owed(handoff))
        for handoff in self._handoffs.take_releasable():
            self._spawn(self._sources.release(handoff))
        for handoff in self._handoffs.take_joined():
            self._tell(handoff, token_events.joined(handoff))
            if handoff.source is not None:
                self._timeline.add(handoff.timeline_event())
        self._wake()
        self._drainer.changed()

    def resume_elsewhere(self, handoff: Handoff) -> None:
        """Ends it here; its ingress plans the rest anew, with the tokens shown so far."""
        self._tell(handoff, token_events.resume(handoff))
        self._handoffs.end(*handoff.key, time.monotonic())

    async def _fetch(self, fetch: Fetch) -> None:
        request_id_var.set(fetch.handoff.request_id)
        handoff, number = fetch.handoff, fetch.announce.number
        try:
            fetched = await self._sources.fetch(fetch)
        except BatonError as error:
            logger.warning("fetch %d of %s failed: %s", number, handoff.request_id, error)
            if self._handoffs.fetch_failed(handoff, number, time.monotonic()):
                self._tell(handoff, token_events.resume(handoff))
        else:
            self._handoffs.fetched(handoff, number, fetched, time.monotonic())
        self.settle()

    async def _borrow_owed(self, handoff: Handoff) -> None:
        await self._sources.borrow_owed(handoff)
        if not self._handoffs.claim(handoff, time.monotonic()) and self._handoffs.find(*handoff.key) is handoff:
            self.resume_elsewhere(handoff)
        self.settle()

    def _tell(self, handoff: Handoff, event: TokenEvent) -> None:
        self._outbox.put(handoff.message.ingress_id, event, time.monotonic())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._rested)

    def _rested(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._drainer.changed()

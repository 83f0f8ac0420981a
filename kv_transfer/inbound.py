"""What one rank receives, from all its peers: links, grants within the limits of flow control, slabs that land."""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from core.config import TransferConfig
from core.errors import BatonError, StaleMessage, TransferFailed
from core.messages.to_rank import Ready, SlabHeader, TimelineEvent
from kv_transfer.channels.protocol import Passage
from kv_transfer.flow_control import Flow, FlowControl, Grants, Slab
from kv_transfer.link import Identity, Link, Linker, within
from kv_transfer.peer_control import PeerControl
from kv_transfer.timeline import Timeline
from kv_transfer.transfer import Transfer, drop_result, when_done


@dataclass(eq=False)
class _Fetch:
    """A flow's progress, for whoever waits for its end."""

    transfer: Transfer
    flow: Flow
    num_slabs: int
    asked_at: float
    done: "asyncio.Future[int]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    num_bytes: int = 0
    may_relink: bool = True

    def landed(self, passage: Passage) -> None:
        """One slab more; the last one ends the fetch."""
        self.num_bytes += passage.num_bytes
        self.num_slabs -= 1
        if not self.num_slabs and not self.done.done():
            self.done.set_result(self.num_bytes)

    def fail(self, error: Exception) -> None:
        """The first failure ends the fetch."""
        if not self.done.done():
            self.done.set_exception(error)


class Inbound:
    """Any number of fetches at a time. Belongs to one event loop."""

    def __init__(
        self, identity: Identity, config: TransferConfig, control: PeerControl, linker: Linker, timeline: Timeline
    ) -> None:
        self._identity = identity
        self._config = config
        self._control = control
        self._linker = linker
        self._timeline = timeline
        self._flow = FlowControl(int(config.pair_window_mib * 2**20), int(config.rank_window_mib * 2**20))
        self._fetches: dict[Flow, _Fetch] = {}
        self._links: dict[str, Link] = {}
        self._linking: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def fetch(self, peer: str, transfer: Transfer, slabs: Sequence[Slab]) -> int:
        """Receives slabs from one peer; returns the bytes written. Raises TransferFailed, PeerLost or Incompatible.

        A peer that does not know the channel (it restarted, or closed it to make room) is connected to anew, once.
        """
        fetch = _Fetch(transfer, Flow(peer, transfer.due, deque(slabs)), len(slabs), time.monotonic())
        self._fetches[fetch.flow] = fetch
        self._flow.add(fetch.flow)
        self._pump()
        try:
            return await fetch.done
        finally:
            self._flow.drop(fetch.flow)
            del self._fetches[fetch.flow]
            self._pump()

    def prepare(self, peer: str) -> None:
        """Connects to a peer ahead of use. Whether that fails shows when it is used."""
        self._spawn(self._open_link(peer))

    @property
    def num_links(self) -> int:
        """Peers that a channel is open from."""
        return len(self._links)

    async def close(self) -> None:
        """Ends all channels and everything that waits on them."""
        self._is_closed = True
        for fetch in self._fetches.values():
            fetch.fail(TransferFailed("the transfer agent is closing"))
        await asyncio.gather(*(self._drop(link, "closing") for link in list(self._links.values())))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- granting -----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Asks for what there is room for; connects where something is wanted and no channel is open."""
        if self._is_closed:
            return
        able = {peer for peer, link in self._links.items() if self._linker.is_usable(link) and not link.is_granting}
        for peer, grants in self._flow.take(able).items():
            link = self._links[peer]
            link.is_granting = True
            self._linker.use(link)
            self._spawn(self._grant(link, grants))
        for peer in self._flow.waiting_peers():
            present = self._links.get(peer)
            is_idle = peer not in self._linking and peer not in self._flow.in_flight
            if is_idle and (present is None or not (self._linker.is_usable(present) or present.is_granting)):
                self._spawn(self._open_link(peer))

    async def _grant(self, link: Link, grants: Grants) -> None:
        """Tells the sender, then posts the fetches in the same order. Runs to its end even if all callers are gone."""
        wanted = [(self._fetches[flow], slab) for flow, slab in grants if flow in self._fetches]
        for flow, slab in grants:
            if flow not in self._fetches:
                self._flow.give_back(flow, slab)
        headers = tuple(
            SlabHeader(
                link.next_sequence + index,
                fetch.transfer.request_id,
                fetch.transfer.attempt,
                slab.copy.source,
                fetch.transfer.lease_id,
                slab.logical_blocks,
                fetch.transfer.group,
            )
            for index, (fetch, slab) in enumerate(wanted)
        )
        try:
            refused = await self._tell_ready(link, headers) if headers else ()
        except StaleMessage as error:
            self._drop(link, "unknown to the sender")
            self._ask_again(wanted, error)
        except BatonError as error:  # nobody knows what was granted
            self._drop(link, "a grant went unanswered")
            for fetch, slab in wanted:
                self._flow.give_back(fetch.flow, slab)
                fetch.fail(error)
        else:
            link.next_sequence += len(headers)
            for header, (fetch, slab) in zip(headers, wanted, strict=True):
                self._post(link, header, fetch, slab, is_refused=header.sequence in refused)
        finally:
            link.is_granting = False
            self._linker.rest(link)
            self._pump()

    async def _tell_ready(self, link: Link, headers: tuple[SlabHeader, ...]) -> tuple[int, ...]:
        """Numbers of the slabs that the sender refuses. Raises StaleMessage also when the link ended meanwhile."""
        ready = Ready(self._identity.address, self._identity.incarnation, link.generation, headers)
        granted = await within(self._config.control_timeout_s, link.peer, self._control.ready(link.peer, ready))
        if self._links.get(link.peer) is not link:
            raise StaleMessage(f"the channel from {link.peer} ended while slabs were granted", field="generation")
        return granted.refused

    def _ask_again(self, wanted: "list[tuple[_Fetch, Slab]]", error: StaleMessage) -> None:
        """Over the next generation, once; whoever was refused twice fails."""
        self._flow.put_back([(fetch.flow, slab) for fetch, slab in wanted])
        for fetch in {fetch for fetch, _ in wanted}:
            if not fetch.may_relink:
                fetch.fail(TransferFailed(f"{fetch.flow.peer} refused: {error}"))
            fetch.may_relink = False

    def _post(self, link: Link, header: SlabHeader, fetch: _Fetch, slab: Slab, *, is_refused: bool) -> None:
        if is_refused:
            self._flow.give_back(fetch.flow, slab)
            fetch.fail(TransferFailed(f"{link.peer} refused a slab of request {header.request_id}"))
            return
        self._linker.use(link)
        future = link.end.fetch(header, slab.copy.destination, fetch.transfer.landing, self._config.data_timeout_s)
        when_done(future, partial(self._landed, link, fetch, slab))

    def _landed(self, link: Link, fetch: _Fetch, slab: Slab, future: "Future[Passage]") -> None:
        self._linker.rest(link)
        self._flow.give_back(fetch.flow, slab)
        error = future.exception()
        if error is None:
            self._linker.moved(link, future.result())
            self._note(fetch, future.result())
            fetch.landed(future.result())
        else:
            fetch.fail(error if isinstance(error, BatonError) else TransferFailed(str(error)))
        self._pump()

    def _note(self, fetch: _Fetch, passage: Passage) -> None:
        transfer, peer = fetch.transfer, fetch.flow.peer
        moments = (fetch.asked_at, passage.begun_at, passage.turned_at, passage.done_at)
        for phase, (begun_at, ended_at) in zip(("wait", "wire", "scatter"), pairwise(moments), strict=True):
            if ended_at > begun_at:
                self._timeline.add(
                    TimelineEvent(
                        transfer.request_id, transfer.attempt, phase, peer, begun_at, ended_at, passage.num_bytes
                    )
                )

    # ---- links --------------------------------------------------------------------------------------------------

    async def _open_link(self, peer: str) -> None:
        """One at a time per peer; a failure fails all that wait for the peer."""
        if peer in self._linking:
            return
        self._linking.add(peer)
        try:
            old = self._links.get(peer)
            if old is not None:
                if self._linker.is_usable(old):
                    return
                await self._drop(old, "failed, or another transport is due")
            link = self._links[peer] = await self._linker.connect(peer, self._evict)
            if self._is_closed:
                await self._drop(link, "closing")
        except BatonError as error:
            for fetch in [fetch for flow, fetch in self._fetches.items() if flow.peer == peer]:
                fetch.fail(error)
        finally:
            self._linking.discard(peer)
            self._pump()

    async def _evict(self, link: Link) -> None:
        await self._drop(link, "its memory is wanted")

    def _drop(self, link: Link, reason: str) -> "asyncio.Task[None]":
        """Nothing more is granted over it; done when nothing is written through it."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        return self._spawn(self._linker.end(link, reason))

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        """A task that lives on when whoever wanted it is gone; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(drop_result)
        return task

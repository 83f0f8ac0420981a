"""Faults on purpose: messages lost, late, doubled or overtaken; wires that break, lie or drag."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from core.errors import PeerLost
from core.security import Security
from kv_transfer.channels.in_process import Hub, InProcessConnector
from kv_transfer.channels.two_sided import Wire
from rpc import methods
from rpc.client import RpcClient

Deliver = Callable[[], Awaitable[object]]
Meddle = Callable[[str, Deliver], Awaitable[object]]  # (the method's name, the call itself) -> the answer

LATE_S = 0.2
HANDOFF_METHODS = frozenset(
    method.name
    for method in (
        *(methods.OPEN, methods.PREFILL, methods.ANNOUNCE, methods.COMMIT, methods.ABANDON, methods.CANCEL),
        *(methods.RELEASE, methods.CONNECT, methods.READY, methods.DIGEST_BLOCKS, methods.CLOSE_CHANNEL),
        *(methods.FETCH_BLOCKS, methods.PREPARE_PAIRS),
    )
)


class MeddledClient(RpcClient):
    """Every call passes through someone who may drop, hold or repeat it."""

    def __init__(self, security: Security, meddle: Meddle) -> None:
        super().__init__(security)
        self.is_mute = False  # who is killed does not say goodbye
        self._meddle = meddle

    async def call(self, address, method, request, timeout_s):
        if self.is_mute:
            raise PeerLost("nobody calls any more")
        return await self._meddle(method.name, partial(super().call, address, method, request, timeout_s))


def meddle_with_all_calls(monkeypatch, meddle: Meddle) -> None:
    """Ranks and ingresses that start from now on."""
    for module in ("worker.rank", "bench.control_plane"):
        monkeypatch.setattr(f"{module}.RpcClient", lambda security: MeddledClient(security, meddle))


class Gate:
    """Holds one kind of call, before it is delivered or after, until it is opened."""

    def __init__(self, method: str, *, delivered: bool = False, after: str = "") -> None:
        """With `after`, the gate counts as reached only when a call of that kind has been answered too."""
        self.opened, self._held, self._answered = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._method, self._delivered, self._after = method, delivered, after

    async def __call__(self, name: str, deliver: Deliver) -> object:
        """A Meddle."""
        if name != self._method or self.opened.is_set():
            answer = await deliver()
            if name == self._after:
                self._answered.set()
            return answer
        answer = await deliver() if self._delivered else None
        self._held.set()
        await self.opened.wait()
        return answer if self._delivered else await deliver()

    async def until_reached(self) -> None:
        """A call waits here."""
        async with asyncio.timeout(20):
            await self._held.wait()
            if self._after:
                await self._answered.wait()


class RandomFaults:
    """A share of all messages of a handoff, and of all slabs, meets with one."""

    def __init__(self, seed: int, share: float) -> None:
        self.counts: Counter[str] = Counter()
        self.num_messages = self.num_slabs = 0
        self.random = random.Random(seed)
        self._share = share
        self._overtaken = asyncio.Event()

    def connect(self):
        """A Rank's `connect`: channels through memory with faults."""
        hub = _FaultyHub(self)
        return lambda config, host, pool, path: (InProcessConnector(hub, pool),)

    async def __call__(self, name: str, deliver: Deliver) -> object:
        """A Meddle."""
        if name not in HANDOFF_METHODS:
            return await deliver()
        self.num_messages += 1
        match self.draw(name, ("drop", "drop the answer", "delay", "duplicate", "reorder")):
            case "drop":
                raise PeerLost(f"{name} was dropped")
            case "drop the answer":
                await deliver()
                raise PeerLost(f"the answer to {name} was dropped")
            case "delay":
                await asyncio.sleep(self.random.uniform(0, LATE_S))
            case "duplicate":
                first, _ = await asyncio.gather(deliver(), deliver(), return_exceptions=True)
                if isinstance(first, BaseException):
                    raise first
                return first
            case "reorder":
                self._overtaken.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._overtaken.wait(), LATE_S)
        answer = await deliver()
        self._overtaken.set()
        return answer

    def draw(self, where: str, kinds: tuple[str, ...]) -> str | None:
        """One of these now and then, from any thread."""
        if self.random.random() >= self._share:
            return None
        kind = self.random.choice(kinds)
        self.counts[f"{where}: {kind}" if where == "slab" else kind] += 1
        return kind


class _FaultyHub(Hub):
    def __init__(self, faults: RandomFaults) -> None:
        super().__init__()
        self._faults = faults

    def join(self, channel, rank) -> Wire:
        return _FaultyWire(super().join(channel, rank), self._faults)


class _FaultyWire:
    """Between the slab buffers of an end and the line: what is gathered may leave changed."""

    def __init__(self, wire: Wire, faults: RandomFaults) -> None:
        self._wire, self._faults = wire, faults
        self.stream, self.abort = wire.stream, wire.abort

    def start_send(self, slab):
        self._faults.num_slabs += 1
        if self._befallen(("abort", "slow", "corrupt")) == "corrupt":
            slab.bitwise_not_()
        return self._wire.start_send(slab)

    def start_receive(self, slab):
        self._befallen(("abort", "slow"))
        return self._wire.start_receive(slab)

    def _befallen(self, kinds: tuple[str, ...]) -> str | None:
        kind = self._faults.draw("slab", kinds)
        if kind == "abort":
            self._wire.abort()
        elif kind == "slow":
            time.sleep(self._faults.random.uniform(0, LATE_S))
        return kind

"""Which slabs a rank asks for next, over all its peers: bounded bytes, the earliest due first. Pure.

A flow is what one order still wants from one peer. Slabs are granted one by one to the flow that is due first, equal
ones in equal shares of bytes, as long as its pair of ranks and the rank as a whole have room:

    flow --take--> in flight --give_back--> room for the next
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from core.messages.to_rank import Copy


@dataclass(frozen=True)
class Slab:
    """One piece of an order."""

    copy: Copy
    logical_blocks: tuple[int, ...]  # of the request, one for each block of the copy's source
    num_bytes: int


@dataclass(eq=False)
class Flow:
    """`due` is a moment of the caller's clock: the smaller, the sooner its slabs are granted."""

    peer: str
    due: float
    waiting: deque[Slab]
    granted_bytes: int = 0


Grants = list[tuple[Flow, Slab]]


@dataclass
class FlowControl:
    """A slab larger than a limit passes alone."""

    pair_bytes: int  # in flight from one peer
    rank_bytes: int  # in flight from all peers
    flows: list[Flow] = field(default_factory=list)
    in_flight: dict[str, int] = field(default_factory=dict)  # bytes by peer

    def add(self, flow: Flow) -> None:
        """Its slabs wait for room."""
        self.flows.append(flow)

    def drop(self, flow: Flow) -> None:
        """Nothing more is granted to it; slabs in flight are given back as they end. Idempotent."""
        if flow in self.flows:
            self.flows.remove(flow)

    def waiting_peers(self) -> set[str]:
        """Peers that something is wanted from."""
        return {flow.peer for flow in self.flows if flow.waiting}

    def take(self, peers: Collection[str]) -> dict[str, Grants]:
        """What to ask these peers for now, in this order; it is in flight from here on."""
        taken: dict[str, Grants] = {}
        while (flow := self._next(peers)) is not None:
            slab = flow.waiting.popleft()
            flow.granted_bytes += slab.num_bytes
            self.in_flight[flow.peer] = self.in_flight.get(flow.peer, 0) + slab.num_bytes
            taken.setdefault(flow.peer, []).append((flow, slab))
        return taken

    def give_back(self, flow: Flow, slab: Slab) -> None:
        """A slab is off the wire, or was never on it."""
        self.in_flight[flow.peer] -= slab.num_bytes
        if not self.in_flight[flow.peer]:
            del self.in_flight[flow.peer]

    def put_back(self, grants: Grants) -> None:
        """Nobody took these: they are asked for again, in the same order."""
        for flow, slab in reversed(grants):
            self.give_back(flow, slab)
            flow.granted_bytes -= slab.num_bytes
            flow.waiting.appendleft(slab)

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        assert all(num_bytes > 0 for num_bytes in self.in_flight.values())
        assert len(set(map(id, self.flows))) == len(self.flows)

    def _next(self, peers: Collection[str]) -> Flow | None:
        total_bytes = sum(self.in_flight.values())
        able = [flow for flow in self.flows if flow.waiting and flow.peer in peers and self._fits(flow, total_bytes)]
        return min(able, key=lambda flow: (flow.due, flow.granted_bytes), default=None)

    def _fits(self, flow: Flow, total_bytes: int) -> bool:
        num_bytes, of_pair = flow.waiting[0].num_bytes, self.in_flight.get(flow.peer, 0)
        fits_pair = not of_pair or of_pair + num_bytes <= self.pair_bytes
        return fits_pair and (not total_bytes or total_bytes + num_bytes <= self.rank_bytes)

"""Renews the leases of an ingress's requests: the twin of what cluster/ingress/token_streams.py does. Pure."""

from collections.abc import Iterable, Sized
from functools import partial
from typing import Protocol

from core.messages.to_decode import RenewLeases
from simulator.events import TIMER
from simulator.host import World
from simulator.peers import Peers
from simulator.request import Request


class Owner(Sized, Iterable[Request], Protocol):
    """An ingress, with its open requests."""

    number: int
    alive: bool

    def forgotten(self, request_id: str, attempt: int) -> None:
        """Decode knows nothing of it any more."""
        ...


class LeaseHeartbeat:
    """One per ingress."""

    def __init__(self, world: World, owner: Owner, peers: Peers, interval_s: float) -> None:
        self._world = world
        self._owner = owner
        self._peers = peers
        self._interval_s = interval_s

    def start(self) -> None:
        """The next one is due."""
        self._world.queue.at(self._world.queue.now + self._interval_s, TIMER, self._owner.number, self._beat)

    def _beat(self) -> None:
        of_replica: dict[str, list[Request]] = {}
        for request in self._owner:
            if request.opened and request.plan is not None:
                of_replica.setdefault(request.plan.decode.address, []).append(request)
        for requests in of_replica.values():
            plan = requests[0].plan
            assert plan is not None
            decode = self._peers.decode(plan.decode)
            message = RenewLeases(str(self._owner.number), tuple(request.request_id for request in requests))
            reply = partial(self._renewed, [(request, request.attempt) for request in requests])
            self._world.wire.tell(self._owner.number, decode.host, decode.renew, message, reply)
        self.start()

    def _renewed(self, asked: list[tuple[Request, int]], unknown: tuple[str, ...]) -> None:
        """What decode forgot twice is lost; what it forgot once may have its last event on its way."""
        for request, attempt in asked:
            if request.attempt != attempt or request.plan is None:
                continue
            is_unknown, was_unknown = request.request_id in unknown, request.was_unknown
            request.was_unknown = is_unknown
            if is_unknown and was_unknown:
                self._owner.forgotten(request.request_id, attempt)

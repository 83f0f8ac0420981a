"""KV bytes between replicas: each replica's port has one speed per direction, which its transfers share evenly. Pure.

    rate of a transfer = min(speed of the sender's port / transfers that leave it,
                             speed of the receiver's port / transfers that enter it, limit of the way between them)

What a transfer cannot use, because its other end is slower, is not given to others: the model errs on the slow side.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from simulator.cost.cost_model import Link
from simulator.events import MESSAGE, EventQueue


@dataclass(eq=False, slots=True)
class Transfer:
    """Bytes on their way; `rate` is in bytes per second, `version` tells apart the ends planned for it."""

    source: int
    target: int
    bytes_left: float
    done: Callable[[bool], None]
    rate: float = 0.0
    updated_at: float = 0.0
    version: int = 0


@dataclass(slots=True)
class _Port:
    bytes_per_s: float
    latency_s: float
    leaving: dict[Transfer, None] = field(default_factory=dict)
    entering: dict[Transfer, None] = field(default_factory=dict)


class Network:
    """Ports by the number of their process. `number` is the network's own among all who act."""

    def __init__(self, queue: EventQueue, number: int) -> None:
        self._queue = queue
        self._number = number
        self._ports: dict[int, _Port] = {}
        self._limits: dict[tuple[int, int], float] = {}  # of single ways, in bytes per second
        self.num_bytes = 0

    def add(self, process: int, link: Link) -> None:
        """Gives a process a port."""
        self._ports[process] = _Port(link.bytes_per_s, link.latency_s)

    def limit(self, source: int, target: int, share: float) -> None:
        """From now on nothing goes faster this way than at this share of the slower port's speed."""
        speed = min(self._ports[source].bytes_per_s, self._ports[target].bytes_per_s)
        self._limits[source, target] = share * speed
        self._share(list(self._ports[source].leaving))

    def slow_down(self, process: int, share: float) -> None:
        """From now on a port has this share of its speed."""
        port = self._ports[process]
        port.bytes_per_s *= share
        self._share([*port.leaving, *port.entering])

    def send(self, source: int, target: int, num_bytes: int, done: Callable[[bool], None]) -> None:
        """Calls `done` when the last byte is there: whether all came."""
        latency_s = max(self._ports[source].latency_s, self._ports[target].latency_s)
        transfer = Transfer(source, target, float(num_bytes), done)
        self._queue.at(self._queue.now + latency_s, MESSAGE, self._number, self._begin, transfer)

    def cut(self, process: int) -> None:
        """A process is gone: what it sends or receives ends here."""
        port = self._ports.pop(process)
        broken = [*port.leaving, *port.entering]
        for transfer in broken:
            self._forget(transfer)
            self._queue.at(self._queue.now, MESSAGE, self._number, transfer.done, False)
        others = {transfer.target for transfer in broken} | {transfer.source for transfer in broken}
        for other in sorted(others & self._ports.keys()):
            self._share([*self._ports[other].leaving, *self._ports[other].entering])

    def __len__(self) -> int:
        return sum(len(port.leaving) for port in self._ports.values())

    def _begin(self, transfer: Transfer) -> None:
        if transfer.source not in self._ports or transfer.target not in self._ports:
            transfer.done(False)
            return
        source, target = self._ports[transfer.source], self._ports[transfer.target]
        transfer.updated_at = self._queue.now
        source.leaving[transfer] = target.entering[transfer] = None
        self.num_bytes += round(transfer.bytes_left)
        self._share([*source.leaving, *target.entering])

    def _share(self, transfers: list[Transfer]) -> None:
        """Settles what has come so far, and plans the ends anew of those whose rate changes."""
        now = self._queue.now
        for transfer in dict.fromkeys(transfers):
            source, target = self._ports[transfer.source], self._ports[transfer.target]
            rate = min(source.bytes_per_s / len(source.leaving), target.bytes_per_s / len(target.entering))
            if self._limits:
                rate = min(rate, self._limits.get((transfer.source, transfer.target), rate))
            if rate == transfer.rate:
                continue
            transfer.bytes_left -= transfer.rate * (now - transfer.updated_at)
            transfer.rate, transfer.updated_at = rate, now
            transfer.version += 1
            end = now + max(0.0, transfer.bytes_left) / rate
            self._queue.at(end, MESSAGE, self._number, self._end, transfer, transfer.version)

    def _end(self, transfer: Transfer, version: int) -> None:
        if version != transfer.version:
            return
        source, target = self._ports[transfer.source], self._ports[transfer.target]
        self._forget(transfer)
        transfer.done(True)
        self._share([*source.leaving, *target.entering])

    def _forget(self, transfer: Transfer) -> None:
        transfer.version += 1
        for port in (self._ports.get(transfer.source), self._ports.get(transfer.target)):
            if port is not None:
                port.leaving.pop(transfer, None)
                port.entering.pop(transfer, None)

"""What befalls a simulated fleet, at the moments that its description names. Pure."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from core.errors import ConfigurationError
from core.messages.fleet import Role
from simulator.events import TIMER
from simulator.fault_spec import (
    Burst,
    DeadReplica,
    Fault,
    LyingReplica,
    SchedulerRestart,
    SkewedClock,
    SlowLink,
    SlowReplica,
)
from simulator.fleet import Fleet, Replica
from simulator.fleet_spec import FleetSpec
from simulator.host import World
from simulator.traces.trace import TracedRequest

FAULTS = (1 << 30) + 1  # acts after the sampler has looked
HEARTBEAT_S = 1.0  # of supervisors: by then a new scheduler has heard of every replica


class Faults:
    """All of one run."""

    def __init__(self, world: World, fleet: Fleet, spec: FleetSpec, chance: random.Random) -> None:
        self._world = world
        self._fleet = fleet
        self._faults = spec.faults
        self._chance = chance

    def start(self) -> None:
        """To be called when the first replicas are there."""
        for fault in self._faults:
            if isinstance(fault, SkewedClock):
                self._replica(fault.replica).host.clock_offset_s = fault.offset_s
            elif not isinstance(fault, Burst):
                self._world.queue.at(fault.at_s, TIMER, FAULTS, self._befall, fault)

    def crowd(self, trace: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
        """The trace with its bursts."""
        bursts = [fault for fault in self._faults if isinstance(fault, Burst)]
        for request in trace:
            within = (burst.at_s for burst in bursts if burst.at_s <= request.arrival_s < burst.at_s + burst.over_s)
            yield replace(request, arrival_s=min(within, default=request.arrival_s))

    def _befall(self, fault: Fault) -> None:
        match fault:
            case SlowReplica():
                replica = self._replica(fault.replica)
                replica.set_speed(replica.host.speed * fault.speed)
            case SlowLink():
                self._slow_down(fault)
            case LyingReplica():
                self._replica(fault.replica).host.lies = True
            case DeadReplica():
                self._end(fault)
            case SchedulerRestart():
                back_at = self._world.queue.now + fault.down_s
                self._fleet.scheduler.stop(back_at)
                self._world.queue.at(back_at, TIMER, FAULTS, self._restart)

    def _slow_down(self, fault: SlowLink) -> None:
        network, source = self._world.network, self._replica(fault.replica).host
        if fault.to:
            network.limit(source.number, self._replica(fault.to).host.number, fault.speed)
        else:
            network.slow_down(source.number, fault.speed)

    def _end(self, fault: DeadReplica) -> None:
        info = self._replica(fault.replica).host.info
        self._fleet.remove(fault.replica)
        if fault.back_after_s is not None:
            back_at = self._world.queue.now + fault.back_after_s
            index = int(fault.replica.rpartition("-")[2])
            self._world.queue.at(back_at, TIMER, FAULTS, self._come_back, info.role, index)

    def _come_back(self, role: Role, index: int) -> None:
        self._fleet.add(role, index)

    def _restart(self) -> None:
        self._fleet.scheduler.restart()
        self._fleet.watch_all(lambda: self._chance.uniform(0.0, HEARTBEAT_S))

    def _replica(self, replica_id: str) -> Replica:
        if (found := self._fleet.replicas.get(replica_id)) is None:
            alive = ", ".join(sorted(self._fleet.replicas))
            raise ConfigurationError(f"no replica {replica_id!r} lives when its fault comes; {alive} do")
        return found

"""The digital twin: plays a trace on a described fleet, and returns what became of every request. Pure.

Scheduler, pools, books and policies are the production classes; GPUs and links are replaced by costs. The same trace,
fleet, costs and seed give the same result to the bit.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cluster.scheduler.admission import Admission
from cluster.scheduler.policy import Policy
from core.messages.fleet import Role
from core.messages.to_scheduler import Foresight
from simulator.cost.cost_model import CostModel
from simulator.events import TIMER, EventQueue
from simulator.faults import Faults
from simulator.fleet import GENERATION, Fleet
from simulator.fleet_spec import FleetSpec
from simulator.host import World
from simulator.ingress import Ingress
from simulator.network import Network
from simulator.records import GapHistogram, Record, make_record
from simulator.request import Request, make_request
from simulator.scaling_loop import ScalingLoop
from simulator.scheduler_line import SchedulerLine
from simulator.scheduler_process import SchedulerProcess
from simulator.series import Sampler
from simulator.traces.trace import Run, TracedRequest, expand
from simulator.wire import Wire

MakePolicy = Callable[[FleetSpec, int], Policy]
NETWORK, SCHEDULER = 0, 1  # numbers of processes
SETTLE_S = 1.0  # after the last request: messages that are still on their way arrive


@dataclass
class Result:
    """Of a run that is over."""

    records: list[Record]
    gaps: GapHistogram
    sampler: Sampler
    simulated_s: float
    num_events: int
    num_reports: int
    num_transfer_bytes: int
    num_planned_alone: int  # by ingresses, without the scheduler
    foresight: Foresight | None = None  # of the policy, since the scheduler's last start


class Twin:
    """One run."""

    def __init__(
        self,
        spec: FleetSpec,
        costs: dict[Role, CostModel],
        *,
        seed: int = 0,
        make_policy: MakePolicy | None = None,
        skips: bool = True,
    ) -> None:
        """`make_policy` None takes the production policy; `skips` False runs every step, with the same result."""
        self.spec = spec
        self.queue = EventQueue()
        wire = Wire(self.queue, spec.control_latency_s)
        self.world = World(self.queue, wire, Network(self.queue, NETWORK))
        self.chance = random.Random(seed)
        self._outputs: dict[str, tuple[Run, ...]] = {}
        self._spoken: dict[str, tuple[int, ...]] = {}  # of open requests, token by token
        self.records: list[Record] = []
        self.gaps = GapHistogram()
        self.fleet = Fleet(self.world, spec, costs, self._output, skips=skips)

        def admission() -> Admission:
            policy = make_policy(spec, seed) if make_policy is not None else None
            return Admission(spec.scheduler, spec.autoscaling.rate_window_s, GENERATION, policy)

        self.scheduler = self.fleet.scheduler = SchedulerProcess(self.world, SCHEDULER, admission, self.fleet)
        self.fleet.ingresses = [
            Ingress(self.world, self.fleet.next_number(), self.fleet, spec, self._over)
            for _ in range(spec.num_ingresses)
        ]
        self.sampler = Sampler(self.world, self.fleet, spec)
        self.faults = Faults(self.world, self.fleet, spec, random.Random(self.chance.random()))
        self.scaling = ScalingLoop(self.world, self.fleet, spec) if spec.autoscaling.is_active else None
        self._num_open = 0
        self._has_more = True
        self._over_at = 0.0

    def run(self, trace: Iterable[TracedRequest]) -> Result:
        """Plays a trace, whose requests are in order of arrival, to its end."""
        for role in Role:
            pool = self.spec.pool(role)
            for index in range(pool.replicas if pool is not None else 0):
                self.fleet.add(role, index)
        self.scheduler.start()
        for ingress in self.fleet.ingresses:
            ingress.start(SchedulerLine(self.world, ingress, self.scheduler, random.Random(self.chance.random())))
        self.sampler.start()
        self.faults.start()
        if self.scaling is not None:
            self.scaling.start()
        self._await_arrival(self.faults.crowd(trace))
        self.queue.run(self._goes_on)
        self.sampler.sample()
        return Result(
            self.records,
            self.gaps,
            self.sampler,
            self.queue.now,
            self.queue.num_events,
            self.fleet.num_reports,
            self.world.network.num_bytes,
            sum(ingress.line.num_alone for ingress in self.fleet.ingresses),
            self.scheduler.admission.policy.foresight(),
        )

    def _await_arrival(self, trace: Iterator[TracedRequest]) -> None:
        traced = next(trace, None)
        if traced is None:
            self._has_more = False
            return
        self.queue.at(traced.arrival_s, TIMER, NETWORK, self._arrive, traced, trace)

    def _arrive(self, traced: TracedRequest, trace: Iterator[TracedRequest]) -> None:
        spec, output = self.spec, expand(traced.output)
        assert traced.request_id not in self._outputs, f"request id {traced.request_id} is used twice"
        self._outputs[traced.request_id], self._spoken[traced.request_id] = traced.output, output
        request = make_request(
            traced.request_id,
            self.queue.now,
            traced.prompt,
            output,
            traced.tenant,
            spec.block_size,
            spec.clients.timeout_s,
            traced.slo_class,
        )
        self._num_open += 1
        self.sampler.arrived()
        self.fleet.ingress(traced.request_id).arrive(request)
        self._await_arrival(trace)

    def _over(self, request: Request, outcome: str) -> None:
        record, gaps = make_record(request, outcome, self.queue.now)
        self.records.append(record)
        self.gaps.add(gaps)
        self.sampler.over(record)
        del self._spoken[request.request_id]
        self._num_open -= 1
        self._over_at = self.queue.now

    def _output(self, request_id: str) -> tuple[int, ...]:
        """Replicas may still compute a request that its client has given up."""
        return self._spoken.get(request_id) or expand(self._outputs[request_id])

    def _goes_on(self) -> bool:
        return self._has_more or self._num_open > 0 or self.queue.now < self._over_at + SETTLE_S

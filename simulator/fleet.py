"""The simulated fleet: who is there under which identity, who comes, who goes. Pure."""

from collections.abc import Callable, Sequence
from itertools import count
from zlib import crc32

from core.block_hash import HASH_SCHEME
from core.kv_layout import Compatibility
from core.messages.fleet import ReplicaInfo, Role
from simulator.cost.cost_model import CostModel
from simulator.decode_replica import DecodeReplica
from simulator.events import TIMER
from simulator.fleet_spec import FleetSpec, PoolSection
from simulator.host import Host, World
from simulator.ingress import Ingress
from simulator.prefill_replica import PrefillReplica
from simulator.reporting import Reporting
from simulator.scheduler_process import SchedulerProcess

Replica = PrefillReplica | DecodeReplica
Outputs = Callable[[str], tuple[int, ...]]

HOUSEKEEPING_S = 0.5
GENERATION = "v1"


class Fleet:
    """Implements Peers. `costs` say how long steps of a pool's replicas take."""

    def __init__(
        self, world: World, spec: FleetSpec, costs: dict[Role, CostModel], outputs: Outputs, *, skips: bool
    ) -> None:
        self._world = world
        self._spec = spec
        self._costs = costs
        self._outputs = outputs
        self._skips = skips
        self._processes = count(2)  # 0 is the network, 1 the scheduler
        self._by_address: dict[str, Replica] = {}
        self._incarnations: dict[str, int] = {}
        self._reporting: dict[str, Reporting] = {}
        self.scheduler: SchedulerProcess
        self.ingresses: list[Ingress] = []
        self.replicas: dict[str, Replica] = {}  # that live, by id

    def next_number(self) -> int:
        """Of a new process."""
        return next(self._processes)

    def add(self, role: Role, index: int) -> Replica:
        """A replica that is ready and begins to report; one that had this name before is another incarnation."""
        pool = self._spec.pool(role)
        assert pool is not None
        replica_id = f"{role.value}-{index}"
        incarnation = self._incarnations[replica_id] = self._incarnations.get(replica_id, 0) + 1
        info = self._info(role, pool, replica_id, incarnation)
        speed = pool.speeds.get(index, 1.0)
        ttl_s = self._spec.transfer.rest_timeout_s
        host = Host(self._world, self.next_number(), info, self._costs[role], speed, ttl_s, pool.step_gap_s)
        self._world.network.add(host.number, self._spec.link.port)
        replica: Replica
        if role is Role.PREFILL:
            at_once = self._spec.layers_per_group or -(-info.layout.num_layers // 2)
            replica = PrefillReplica(host, self, pool, at_once, ttl_s)
        else:
            replica = DecodeReplica(host, self, pool, self._spec, self._skips)
        self.replicas[replica_id] = self._by_address[info.address] = replica
        reporting = self._reporting[info.address] = Reporting(replica, self.scheduler, self._spec.report)
        if self.scheduler.alive:
            reporting.watch()
        self._keep_house(replica)
        return replica

    def remove(self, replica_id: str) -> None:
        """Its process ends at once: what it held is lost, who spoke to it hears of it."""
        replica = self.replicas.pop(replica_id)
        replica.die()
        host, wire = replica.host, self._world.wire
        host.alive = False
        self._world.network.cut(host.number)
        wire.tell(host.number, self.scheduler, self.scheduler.lost, replica_id, host.info.incarnation)
        if host.info.role is Role.DECODE:
            for ingress in self.ingresses:
                wire.tell(host.number, ingress, ingress.decode_lost, replica_id, host.info.incarnation)

    def drain(self, replica_id: str) -> None:
        """It takes nothing new, hands over what does not end in time, and goes when it holds nothing."""
        replica = self.replicas[replica_id]
        replica.host.draining = True
        pool = self._spec.pool(replica.host.info.role)
        assert pool is not None
        self._drain(replica, self._world.queue.now + pool.drain_timeout_s)

    def _drain(self, replica: Replica, deadline: float) -> None:
        if not replica.host.alive:
            return
        if replica.is_idle:
            self.remove(replica.host.info.replica_id)
            return
        queue = self._world.queue
        if queue.now >= deadline:
            replica.hand_over()
        queue.at(queue.now + HOUSEKEEPING_S, TIMER, replica.host.number, self._drain, replica, deadline)

    def watch_all(self, delays_s: Callable[[], float]) -> None:
        """A new scheduler hears of each replica at that one's next heartbeat."""
        for replica in self.replicas.values():
            host = replica.host
            watch = self._reporting[host.info.address].watch
            self._world.queue.at(self._world.queue.now + delays_s(), TIMER, host.number, watch)

    def in_pool(self, role: Role) -> list[Replica]:
        """Those that live, drain or not."""
        return [replica for replica in self.replicas.values() if replica.host.info.role is role]

    @property
    def num_reports(self) -> int:
        """Sent so far."""
        return sum(reporting.num_reports for reporting in self._reporting.values())

    # ---- Peers --------------------------------------------------------------------------------------------------

    def host(self, info: ReplicaInfo) -> Host:
        """See Peers."""
        return self._by_address[info.address].host

    def prefill(self, info: ReplicaInfo) -> PrefillReplica:
        """See Peers."""
        replica = self._by_address[info.address]
        assert isinstance(replica, PrefillReplica)
        return replica

    def decode(self, info: ReplicaInfo) -> DecodeReplica:
        """See Peers."""
        replica = self._by_address[info.address]
        assert isinstance(replica, DecodeReplica)
        return replica

    def ingress(self, request_id: str) -> Ingress:
        """See Peers."""
        return self.ingresses[crc32(request_id.encode()) % len(self.ingresses)]

    def output(self, request_id: str) -> Sequence[int]:
        """See Peers."""
        return self._outputs(request_id)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _info(self, role: Role, pool: PoolSection, replica_id: str, incarnation: int) -> ReplicaInfo:
        spec = self._spec
        layout, num_blocks = spec.layout(pool), spec.num_blocks(pool)
        return ReplicaInfo(
            replica_id,
            role,
            incarnation,
            (f"{replica_id}.{incarnation}",),
            layout,
            Compatibility(spec.model, "", layout.dtype, spec.block_size, HASH_SCHEME),
            num_blocks,
            pool.max_num_seqs,
            pool.max_num_batched_tokens,
            layout.longest_within(num_blocks, pool.max_num_batched_tokens, spec.max_model_len),
            generation=GENERATION,
            **spec.device_facts(pool)._asdict(),
        )

    def _keep_house(self, replica: Replica) -> None:
        if replica.host.alive:
            replica.housekeep()
            queue = self._world.queue
            queue.at(queue.now + HOUSEKEEPING_S, TIMER, replica.host.number, self._keep_house, replica)

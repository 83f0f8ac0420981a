"""How the pools of a simulated fleet fare over time: one point per interval and pool. Pure."""

from dataclasses import dataclass, field

from core.messages.fleet import Role
from simulator.events import TIMER
from simulator.fleet import Fleet
from simulator.fleet_spec import FleetSpec
from simulator.host import World
from simulator.records import Record

SAMPLER = 1 << 30  # looks after all who act


@dataclass(frozen=True, slots=True)
class PoolPoint:
    """One pool at the end of an interval; shares are means over the interval and the pool's replicas."""

    time_s: float
    num_replicas: int
    utilization: float  # share of the time in which engines computed
    num_waiting: int  # requests on replicas that do not run yet
    num_running: int
    kv_usage: float  # share of blocks that somebody holds
    hit_rate: float  # cached share of the prompt tokens that were prefilled here in the interval; 0 without any


@dataclass(frozen=True, slots=True)
class FleetPoint:
    """The whole fleet at the end of an interval."""

    time_s: float
    num_queued: int  # at the scheduler
    num_open: int
    arrivals_per_s: float
    good_per_s: float  # requests that ended in the interval within both SLOs
    mean_ttft_s: float  # of those that ended in the interval
    mean_tpot_s: float


@dataclass(slots=True)
class _Totals:
    busy_s: float = 0.0
    num_prompt: int = 0
    num_cached: int = 0


@dataclass
class _Interval:
    num_arrived: int = 0
    num_good: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)


class Sampler:
    """Looks at the fleet every `spec.sample_s`; looking changes nothing."""

    def __init__(self, world: World, fleet: Fleet, spec: FleetSpec) -> None:
        self._world = world
        self._fleet = fleet
        self._spec = spec
        self._totals: dict[str, _Totals] = {}  # by address of an incarnation
        self._interval = _Interval()
        self._sampled_at = 0.0
        self.pools: dict[Role, list[PoolPoint]] = {role: [] for role in Role}
        self.fleet: list[FleetPoint] = []

    def start(self) -> None:
        """Begins to look."""
        self._world.queue.at(self._world.queue.now + self._spec.sample_s, TIMER, SAMPLER, self._tick)

    def arrived(self) -> None:
        """A request came."""
        self._interval.num_arrived += 1

    def over(self, record: Record) -> None:
        """A request ended."""
        slo, interval = self._spec.slo, self._interval
        interval.num_good += record.meets(slo.ttft_s, slo.tpot_s)
        if record.is_completed:
            interval.ttfts_s.append(record.ttft_s)
            interval.tpots_s.append(record.tpot_s)

    def sample(self) -> None:
        """One point of every series."""
        now = self._world.queue.now
        passed_s = now - self._sampled_at
        if passed_s <= 0:
            return
        for role in Role:
            self.pools[role].append(self._pool(role, now, passed_s))
        interval, admission = self._interval, self._fleet.scheduler.admission
        num_open = sum(len(ingress) for ingress in self._fleet.ingresses)
        self.fleet.append(
            FleetPoint(
                now,
                admission.num_waiting,
                num_open,
                interval.num_arrived / passed_s,
                interval.num_good / passed_s,
                _mean(interval.ttfts_s),
                _mean(interval.tpots_s),
            )
        )
        self._interval, self._sampled_at = _Interval(), now

    def _tick(self) -> None:
        self.sample()
        self.start()

    def _pool(self, role: Role, now: float, passed_s: float) -> PoolPoint:
        replicas = self._fleet.in_pool(role)
        busy_s, num_prompt, num_cached, num_waiting, num_running, num_held, num_blocks = 0.0, 0, 0, 0, 0, 0, 0
        for replica in replicas:
            replica.advance()
            host, status = replica.host, replica.status()
            before = self._totals.get(host.info.address) or _Totals()
            busy_s += replica.busy_s - before.busy_s
            num_prompt += host.num_prompt_tokens - before.num_prompt
            num_cached += host.num_cached_tokens - before.num_cached
            self._totals[host.info.address] = _Totals(replica.busy_s, host.num_prompt_tokens, host.num_cached_tokens)
            num_waiting += status.num_waiting
            num_running += status.num_running
            num_held += host.pool.num_held
            num_blocks += host.info.num_blocks
        return PoolPoint(
            now,
            len(replicas),
            busy_s / (passed_s * len(replicas)) if replicas else 0.0,
            num_waiting,
            num_running,
            num_held / num_blocks if num_blocks else 0.0,
            num_cached / num_prompt if num_prompt else 0.0,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")

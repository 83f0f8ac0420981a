"""Reports of one replica to the global scheduler: the twin of worker/reporter.py. Pure.

Each incarnation of the scheduler gets a snapshot first, then what changed, at a steady interval.
"""

from core.block_hash import BlockKey
from core.messages.to_scheduler import ReplicaStatus, Report
from simulator.decode_replica import DecodeReplica
from simulator.events import TIMER
from simulator.fleet_spec import ReportSection
from simulator.prefill_replica import PrefillReplica
from simulator.scheduler_process import SchedulerProcess


class Reporting:
    """One per replica, for one watcher."""

    def __init__(
        self, replica: PrefillReplica | DecodeReplica, scheduler: SchedulerProcess, section: ReportSection
    ) -> None:
        self._replica = replica
        self._scheduler = scheduler
        self._section = section
        self._watcher = -1  # incarnation of the scheduler that watches
        self._sequence = 0
        self._reported_at = 0.0
        self._status: ReplicaStatus | None = None
        self._num_steps = self._num_transfers = 0  # samples that have been told of
        self.num_reports = 0

    def watch(self) -> None:
        """The scheduler begins to watch."""
        if not self._replica.host.alive or self._watcher == self._scheduler.incarnation:
            return
        self._watcher, self._sequence = self._scheduler.incarnation, 0
        self._replica.advance()
        samples = self._replica.host.samples
        self._num_steps, self._num_transfers = samples.steps.num_seen, samples.transfers.num_seen
        self._replica.host.pool.drain_events()
        self._send(self._replica.status(), self._replica.host.pool.snapshot(), (), snapshot=True)
        self._later()

    def _tick(self, watcher: int) -> None:
        host = self._replica.host
        if watcher != self._watcher or watcher != self._scheduler.incarnation or not host.alive:
            return
        if self._scheduler.alive:
            self._replica.advance()
            status, (stored, removed) = self._replica.status(), host.pool.drain_events()
            is_quiet = status == self._status and not stored and not removed
            if not is_quiet or host.world.queue.now - self._reported_at >= self._section.quiet_interval_s:
                self._sequence += 1
                self._send(status, stored, removed, snapshot=False)
        self._later()

    def _send(
        self, status: ReplicaStatus, stored: tuple[BlockKey, ...], removed: tuple[BlockKey, ...], *, snapshot: bool
    ) -> None:
        host, scheduler = self._replica.host, self._scheduler
        self._status, self._reported_at = status, host.world.queue.now
        self.num_reports += 1
        samples = host.samples
        steps, transfers = samples.steps.since(self._num_steps), samples.transfers.since(self._num_transfers)
        self._num_steps, self._num_transfers = samples.steps.num_seen, samples.transfers.num_seen
        told = host.told(status)
        report = Report(host.info, self._sequence, snapshot, told, stored, removed, steps=steps, transfers=transfers)
        host.world.wire.tell(host.number, scheduler, scheduler.report, self._watcher, report)

    def _later(self) -> None:
        host = self._replica.host
        at = host.world.queue.now + self._section.interval_s
        host.world.queue.at(at, TIMER, host.number, self._tick, self._watcher)

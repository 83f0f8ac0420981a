"""A decode replica without its GPU: the production books behind the twin of decode_worker/service.py. Pure."""

from collections.abc import Callable, Sequence
from functools import partial

from core.errors import BatonError, NoReplica
from core.messages.to_decode import Abandon, Announce, Cancel, Commit, Open, RenewLeases, Ticket
from core.messages.to_prefill import Release
from core.messages.to_rank import Fetched
from core.messages.to_scheduler import ReplicaStatus
from decode_worker.handoff import Fetch, Handoff
from decode_worker.handoffs import Handoffs
from decode_worker.links import Links
from decode_worker.scheduler import DecodeJob, DecodeScheduler, Outcome
from kv_transfer.lease_book import LeaseBook
from simulator.borrowing import Borrowing
from simulator.decode_engine import DecodeEngine
from simulator.fleet_spec import FleetSpec, PoolSection
from simulator.host import Host
from simulator.peers import Peers

Times = list[float]  # when the client gets each token


class DecodeReplica:
    """Its step loop skips quiet steps, so every touch from outside begins with `advance`."""

    def __init__(self, host: Host, peers: Peers, pool: PoolSection, spec: FleetSpec, skips: bool) -> None:
        self.host = host
        self._peers = peers
        self._control_timeout_s = spec.transfer.control_timeout_s
        layout = host.info.layout
        self.scheduler = DecodeScheduler(host.pool, pool.max_num_seqs, pool.max_num_batched_tokens)
        self._book = LeaseBook(layout.kv_groups, spec.transfer.lease_ttl_s)
        limit = pool.max_num_seqs + pool.queue_limit
        self.handoffs = Handoffs(host.pool, layout, self._book, self.scheduler, limit)
        self.engine = DecodeEngine(
            host, self.scheduler, self._draw, self._deliver, self._has_fresh, self._tokens_shown, skips
        )
        self.links = Links()
        self._borrowing = Borrowing(host)
        self._times: dict[tuple[str, int], Times] = {}  # of open attempts
        self._times_of: dict[DecodeJob, Times] = {}
        self._fresh: dict[DecodeJob, Handoff] = {}  # they have no token from here yet
        self._opening: set[tuple[str, int]] = set()  # their prefix comes from elsewhere first

    @property
    def is_idle(self) -> bool:
        """Nothing is held for anybody."""
        return not (len(self.handoffs) or len(self.host.lender) or self._opening or self.engine.in_flight)

    def status(self) -> ReplicaStatus:
        """As DecodeService.status."""
        scheduler = self.scheduler
        return ReplicaStatus(
            num_waiting=len(self.handoffs) - len(scheduler.running),
            num_running=len(scheduler.running),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=self.host.pool.num_free,
            num_kv_tokens=scheduler.num_kv_tokens,
            draining=self.host.draining,
            prefill_tokens_per_s=self.engine.tokens_per_s.value,
            decode_step_s=self.engine.step_s.value,
            num_steps=self.host.num_steps,
            links=self.links.status(),
        )

    # ---- calls --------------------------------------------------------------------------------------------------

    def open(
        self, message: Open, times: Times, reply: Callable[[Ticket], None], failed: Callable[[BatonError], None]
    ) -> None:
        """Promises room. `times` takes the moments at which the client gets this attempt's tokens from here."""
        if self.host.draining:
            raise NoReplica("this decode replica is draining")
        if message.pull_from is None:
            self._open(message, times, reply, failed, None)
            return
        key = message.request_id, message.attempt
        self._opening.add(key)
        source = self._peers.host(message.pull_from)
        then = partial(self._open_pulled, message, times, reply, failed, source)
        self.engine.advance()
        self._borrowing.borrow(f"{key[0]}.{key[1]}", message.sequence, source, then)

    def cancel(self, message: Cancel) -> None:
        """The ingress wants no more of this attempt and lower ones."""
        self.engine.advance()
        self._end(message.request_id, message.attempt)
        self._settle()

    def announce(self, message: Announce) -> None:
        """Starts to fetch at once."""
        self.engine.advance()
        fetch = self.handoffs.announce(message, self.host.now)
        if fetch is not None:
            self._fetch(fetch)
        self.engine.changed()

    def commit(self, message: Commit) -> None:
        """Prefill is done; the request joins the batch when the last byte is in place."""
        self.engine.advance()
        self.handoffs.commit(message, self.host.now)
        self._settle()

    def abandon(self, message: Abandon) -> None:
        """Prefill gives the attempt up, or ended it with its first token."""
        handoff = self.handoffs.find(message.request_id, message.attempt)
        if handoff is not None and handoff.lease.lease_id == message.lease_id:
            self.engine.advance()
            self._end(message.request_id, message.attempt)
            self._settle()

    def renew(self, message: RenewLeases, reply: Callable[[tuple[str, ...]], None]) -> None:
        """An ingress's heartbeat."""
        unknown = self.handoffs.renew(message.request_ids, self.host.now)
        reply(unknown)

    def housekeep(self) -> None:
        """Ends what nobody renewed; who waits too long for another's transfer waits no more."""
        now = self.host.now
        due = [h for h in self.handoffs if h.lease.commit is not None and h.job is None]
        if self._book.expired(now) or due:
            self.engine.advance()
            for lease in self._book.expired(now):
                self._end(lease.request_id, lease.attempt)
            self.handoffs.stop_waiting(now, self._control_timeout_s)
            self._settle()
        if self.host.lender.give_back_expired(now):
            self._settle()

    @property
    def busy_s(self) -> float:
        """How long its engine has computed."""
        return self.host.busy_s + self.engine.under_way_s

    def hand_over(self) -> None:
        """It goes: every ingress plans the rest of its requests anew, with the tokens shown so far."""
        self.engine.advance()
        for handoff in self.handoffs:
            self._resume_elsewhere(handoff)
        self._settle()

    def advance(self) -> None:
        """Brings it to this moment, for those who look."""
        self.engine.advance()

    def set_speed(self, speed: float) -> None:
        """Of the steps that begin from now on."""
        self.engine.advance()
        self.host.speed = speed
        self.engine.replan()

    def die(self) -> None:
        """What its steps have drawn until now is on its way to clients."""
        self.engine.advance()

    # ---- inside: handoffs ---------------------------------------------------------------------------------------

    def _open_pulled(
        self,
        message: Open,
        times: Times,
        reply: Callable[[Ticket], None],
        failed: Callable[[BatonError], None],
        source: Host,
        fetched: Fetched | None,
    ) -> None:
        self._opening.discard((message.request_id, message.attempt))
        if fetched is not None:
            self._measured(source.info.replica_id, fetched)
        try:
            self._open(message, times, reply, failed, fetched)
        except BatonError as error:
            self.host.world.wire.fail(self.host, failed, error)

    def _open(
        self,
        message: Open,
        times: Times,
        reply: Callable[[Ticket], None],
        failed: Callable[[BatonError], None],
        fetched: Fetched | None,
    ) -> None:
        del failed, fetched
        self.engine.advance()
        self._before_end(message.request_id, message.attempt - 1)
        handoff = self.handoffs.open(message, self.host.now)
        self._times[handoff.key] = times
        self._settle()
        self.host.world.wire.tell(
            self.host.number, self._peers.ingress(message.request_id), reply, handoff.ticket(self.host.info)
        )

    def _fetch(self, fetch: Fetch) -> None:
        announce = fetch.announce
        source = self._peers.host(announce.source)
        num_bytes = len(announce.source_blocks) * source.block_bytes(announce.num_layers)
        done = partial(self._fetched, fetch, num_bytes, self.host.world.queue.now)
        self.host.world.network.send(source.number, self.host.number, num_bytes, done)

    def _fetched(self, fetch: Fetch, num_bytes: int, begun_at: float, came: bool) -> None:
        if not self.host.alive:
            return
        handoff, number, now = fetch.handoff, fetch.announce.number, self.host.now
        self.engine.advance()
        if came:
            fetched = Fetched(num_bytes, self.host.world.queue.now - begun_at)
            self._measured(fetch.announce.source.replica_id, fetched)
            self.handoffs.fetched(handoff, number, fetched, now)
        elif self.handoffs.fetch_failed(handoff, number, now):
            self._tell_resume(handoff)
            self._times.pop(handoff.key, None)
        self._settle()

    def _measured(self, source_id: str, fetched: Fetched) -> None:
        self.links.add(source_id, fetched)
        self.host.samples.add_transfer(source_id, fetched.num_bytes, fetched.seconds)

    def _settle(self) -> None:
        """After any change: as HandoffTasks.settle."""
        wire, number = self.host.world.wire, self.host.number
        for handoff in self.handoffs.take_owed():
            self._borrow_owed(handoff)
        for handoff in self.handoffs.take_releasable():
            assert handoff.source is not None
            prefill = self._peers.prefill(handoff.source)
            wire.tell(number, prefill.host, prefill.release, Release(*handoff.key))
        for handoff in self.handoffs.take_joined():
            job = handoff.job
            assert job is not None
            self._fresh[job] = handoff
            self._times_of[job] = self._times[handoff.key]
            ingress = self._peers.ingress(handoff.request_id)
            wire.tell(number, ingress, ingress.joined, *handoff.key)
        self.engine.changed()

    def _borrow_owed(self, handoff: Handoff) -> None:
        assert handoff.source is not None
        source = self._peers.host(handoff.source)
        owed = handoff.owed_blocks()
        name = f"{handoff.request_id}.{handoff.attempt}.owed"

        def next_group(left: list[tuple[int, range]], fetched: Fetched | None) -> None:
            if fetched is not None:
                self._measured(source.info.replica_id, fetched)
            self.engine.advance()
            if left:
                (group, blocks), *rest = left
                then = partial(next_group, rest)
                self._borrowing.borrow_blocks(name, handoff.message.sequence, group, blocks, source, then)
                return
            if not self.handoffs.claim(handoff, self.host.now) and self.handoffs.find(*handoff.key) is handoff:
                self._resume_elsewhere(handoff)
            self._settle()

        next_group(owed, None)

    def _resume_elsewhere(self, handoff: Handoff) -> None:
        self._tell_resume(handoff)
        self._end(*handoff.key)

    def _tell_resume(self, handoff: Handoff) -> None:
        ingress = self._peers.ingress(handoff.request_id)
        self.host.world.wire.tell(self.host.number, ingress, ingress.resume, *handoff.key)

    def _end(self, request_id: str, attempt: int) -> None:
        self._before_end(request_id, attempt)
        handoff = self.handoffs.end(request_id, attempt, self.host.now)
        if handoff is not None:
            self._forget(handoff)

    def _before_end(self, request_id: str, attempt: int) -> None:
        """A running job that will be dropped is part of the step under way."""
        lease = self._book.find(request_id)
        if lease is not None and lease.attempt <= attempt:
            handoff = self.handoffs.find(request_id, lease.attempt)
            if handoff is not None and handoff.job is not None:
                self.engine.before_cancel(handoff.job)

    def _forget(self, handoff: Handoff) -> None:
        self._times.pop(handoff.key, None)
        if handoff.job is not None:
            self._times_of.pop(handoff.job, None)
            self._fresh.pop(handoff.job, None)

    # ---- inside: steps ------------------------------------------------------------------------------------------

    def _draw(self, job: DecodeJob, num_tokens: int) -> Sequence[int]:
        return self._peers.draw(job.request_id, job.sequence.num_outputs, num_tokens)

    def _has_fresh(self) -> bool:
        """The first token of a prompt that was computed here is told to the ingress as it comes."""
        waiting = self.scheduler.waiting
        return any(handoff.source is None and job not in waiting for job, handoff in self._fresh.items())

    def _tokens_shown(self, ends: list[float]) -> None:
        latency_s = self.host.world.wire.latency_s
        shown = [end + latency_s for end in ends]
        for job in self.scheduler.running:
            if job in self._fresh:
                self._first_token(job, ends[0] + self.host.clock_offset_s)
            self._times_of[job] += shown

    def _first_token(self, job: DecodeJob, now: float) -> None:
        self._fresh.pop(job).times.first_token_at = now

    def _deliver(self, outcomes: list[Outcome]) -> None:
        """As DecodeSteps does with a step's outcomes; tokens of quiet steps have been shown already."""
        wire, number = self.host.world.wire, self.host.number
        shown_at = self.host.world.queue.now + wire.latency_s
        for outcome in outcomes:
            job = outcome.job
            handoff = self.handoffs.find(job.request_id, job.attempt)
            if handoff is None:
                continue
            ingress = self._peers.ingress(job.request_id)
            times = self._times_of[job]
            if outcome.token_id is not None and len(times) <= outcome.first_index - self._first_index(handoff):
                times.append(shown_at)
            if job in self._fresh and outcome.token_id is not None:
                self._first_token(job, self.host.now)
                if handoff.source is None:
                    cached = handoff.sequence.num_cached
                    self.host.num_prompt_tokens += handoff.sequence.num_prompt
                    self.host.num_cached_tokens += cached
                    wire.tell(number, ingress, ingress.first_token_here, *handoff.key, cached)
            if outcome.finish_reason == "resume":
                wire.tell(number, ingress, ingress.resume, *handoff.key)
                self._end(*handoff.key)
            elif outcome.finish_reason is not None:
                wire.tell(number, ingress, ingress.finished, *handoff.key, outcome.finish_reason, handoff.phases())
                self._end(*handoff.key)

    @staticmethod
    def _first_index(handoff: Handoff) -> int:
        """Output position of the attempt's first token, wherever that was drawn."""
        return handoff.message.sequence.num_forced

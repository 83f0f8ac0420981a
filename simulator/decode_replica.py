"""A decode replica without its GPU: the production books behind the twin of decode_worker/service.py. Pure."""

from collections.abc import Callable
from functools import partial

from core.errors import BatonError, NoReplica
from core.messages.to_decode import Abandon, Announce, Cancel, Commit, MakeRoom, Open, RenewLeases, Ticket
from core.messages.to_lender import TakeOver
from core.messages.to_prefill import Release
from core.messages.to_rank import Fetched
from core.messages.to_scheduler import ReplicaStatus
from decode_worker.handoff import Fetch, Handoff
from decode_worker.handoffs import Handoffs
from decode_worker.links import Links
from decode_worker.scheduler import DecodeScheduler
from kv_transfer.lease_book import LeaseBook
from simulator.borrowing import Borrowing
from simulator.decode_engine import DecodeEngine
from simulator.decode_tokens import DecodeTokens, Times
from simulator.events import TIMER
from simulator.fleet_spec import FleetSpec, PoolSection
from simulator.host import Host
from simulator.peers import Peers


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
        self.handoffs = Handoffs(
            host.pool, layout, self._book, self.scheduler, limit, self.scheduler.max_num_batched_tokens
        )
        self._tokens = DecodeTokens(host, peers, self.handoffs, self._end)
        self.engine = host.steps = DecodeEngine(host, self.scheduler, self._tokens, skips)
        self.links = Links()
        self._borrowing = Borrowing(host)
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
            self._open(message, times, reply)
            return
        key = message.request_id, message.attempt
        self._opening.add(key)
        source = self._peers.host(message.pull_from)
        then = partial(self._open_pulled, message, times, reply, failed, source)
        self.engine.advance()
        self._borrowing.borrow(f"{key[0]}.{key[1]}", message.sequence.block_hashes, source, then)
        if message.pull_patience_s:
            queue, alone = self.host.world.queue, partial(self._open_now, message, times, reply, failed)
            queue.at(queue.now + message.pull_patience_s, TIMER, self.host.number, alone)

    def cancel(self, message: Cancel) -> None:
        """The ingress wants no more of this attempt and lower ones."""
        self.engine.advance()
        self._end(message.request_id, message.attempt)
        self._settle()

    def make_room(self, message: MakeRoom) -> None:
        """A batch request that is in the way goes on elsewhere, or later."""
        self.engine.advance()
        handoff = self.handoffs.find(message.request_id, message.attempt)
        if handoff is not None:
            self._resume_elsewhere(handoff)
            self._settle()

    def take_over(self, message: TakeOver) -> None:
        """Copies a prefix that many requests begin with."""
        if self.host.draining:
            return
        self.engine.advance()
        source = self._peers.host(message.source)

        def came(fetched: Fetched | None) -> None:
            if fetched is not None:
                self._measured(source.info.replica_id, fetched)

        self._borrowing.borrow(message.name, message.block_hashes, source, came)

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
        if len(self.host.lender):
            with self.host.touching_blocks():
                self.host.lender.give_back_expired(now)

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
        if fetched is not None:
            self._measured(source.info.replica_id, fetched)
        self._open_now(message, times, reply, failed)

    def _open_now(
        self, message: Open, times: Times, reply: Callable[[Ticket], None], failed: Callable[[BatonError], None]
    ) -> None:
        """Its prefix is there, or nobody waits for it any longer."""
        key = message.request_id, message.attempt
        if key not in self._opening or not self.host.alive:
            return
        self._opening.discard(key)
        try:
            self._open(message, times, reply)
        except BatonError as error:
            self.host.world.wire.fail(self.host, failed, error)

    def _open(self, message: Open, times: Times, reply: Callable[[Ticket], None]) -> None:
        self.engine.advance()
        self._before_end(message.request_id, message.attempt - 1)
        handoff = self.handoffs.open(message, self.host.now)
        self._tokens.opened(handoff, times)
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
            self._tokens.tell_resume(handoff)
            self._tokens.forget(handoff)
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
            self._tokens.joined(handoff)
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
        self._tokens.tell_resume(handoff)
        self._end(*handoff.key)

    def _end(self, request_id: str, attempt: int) -> None:
        self._before_end(request_id, attempt)
        handoff = self.handoffs.end(request_id, attempt, self.host.now)
        if handoff is not None:
            self._tokens.forget(handoff)

    def _before_end(self, request_id: str, attempt: int) -> None:
        """A running job that will be dropped is part of the step under way."""
        lease = self._book.find(request_id)
        if lease is not None and lease.attempt <= attempt:
            handoff = self.handoffs.find(request_id, lease.attempt)
            if handoff is not None and handoff.job is not None:
                self.engine.before_cancel(handoff.job)

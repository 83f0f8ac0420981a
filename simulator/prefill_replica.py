"""A prefill replica without its GPU: the production books behind the twin of prefill_worker/service.py. Pure."""

from collections.abc import Callable
from functools import partial

from core.errors import BatonError, NoReplica, PeerLost, StaleMessage
from core.messages.to_decode import Abandon, Announce, Cancel, Commit
from core.messages.to_lender import TakeOver
from core.messages.to_prefill import FirstToken, Prefill, Release
from core.messages.to_rank import Fetched
from core.messages.to_scheduler import ReplicaStatus
from engine.batch import StepResult
from kv_transfer.share_book import ShareBook
from prefill_worker.deliveries import Deliveries, Outgoing
from prefill_worker.scheduler import Prefilled, PrefillScheduler, PrefillStep
from simulator.borrowing import Borrowing
from simulator.cost.cost_model import StepWork
from simulator.events import MESSAGE, STEP_END, TIMER
from simulator.fleet_spec import PoolSection
from simulator.host import Host
from simulator.peers import Peers
from worker.rates import MovingAverage

Reply = Callable[[FirstToken], None]
Key = tuple[str, int]


class PrefillReplica:
    """Computes prompts; layer groups are announced as they would be done, in equal parts of a step."""

    def __init__(self, host: Host, peers: Peers, pool: PoolSection, layers_per_group: int, ttl_s: float) -> None:
        """`ttl_s`: announced blocks that nobody releases are given up so long after."""
        self.host = host
        self._peers = peers
        layout = host.info.layout
        self.scheduler = PrefillScheduler(
            host.pool, layout, pool.max_num_seqs, pool.max_num_batched_tokens, pool.queue_limit
        )
        self._shares = ShareBook(layout.block_size, ttl_s)
        self.deliveries = Deliveries(host.info, host.pool, self.scheduler, self._shares)
        self._borrowing = Borrowing(host)
        starts = range(0, layout.num_layers, layers_per_group)
        self._groups = [(first, min(layers_per_group, layout.num_layers - first)) for first in starts]
        self._answers: dict[Key, tuple[Reply, Callable[[BatonError], None]]] = {}
        self._pulling: set[Key] = set()  # requests that wait for a prefix from elsewhere
        self._tokens_per_s = MovingAverage()
        self._step: PrefillStep | None = None
        self._begun_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Nothing is held for anybody."""
        return not (self._answers or len(self.deliveries) or len(self.host.lender) or self._step is not None)

    def status(self) -> ReplicaStatus:
        """As PrefillService.status."""
        scheduler = self.scheduler
        return ReplicaStatus(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=self.host.pool.num_free,
            num_kv_tokens=0,
            draining=self.host.draining,
            prefill_tokens_per_s=self._tokens_per_s.value,
            decode_step_s=0.0,
            num_steps=self.host.num_steps,
        )

    # ---- calls --------------------------------------------------------------------------------------------------

    def prefill(self, message: Prefill, reply: Reply, failed: Callable[[BatonError], None]) -> None:
        """Answers with the first token, or what kept it from being computed."""
        if self.host.draining:
            raise NoReplica("this prefill replica is draining")
        key = message.request_id, message.attempt
        self._answers[key] = reply, failed
        if message.pull_from is None:
            self._accept(message)
            return
        name, source = f"{key[0]}.{key[1]}", self._peers.host(message.pull_from)
        self._pulling.add(key)
        self._borrowing.borrow(name, message.sequence.block_hashes, source, partial(self._pulled, message))
        if message.pull_patience_s:
            queue = self.host.world.queue
            queue.at(queue.now + message.pull_patience_s, TIMER, self.host.number, self._accept_pulled, message)

    def take_over(self, message: TakeOver) -> None:
        """Copies a prefix that many requests begin with."""
        if self.host.draining:
            return
        source = self._peers.host(message.source)

        def came(fetched: Fetched | None) -> None:
            if fetched is not None:
                self.host.samples.add_transfer(source.info.replica_id, fetched.num_bytes, fetched.seconds)

        self._borrowing.borrow(message.name, message.block_hashes, source, came)

    def cancel(self, message: Cancel) -> None:
        """The ingress wants no more of this attempt and lower ones."""
        self._end(self.deliveries.cancel(message.request_id, message.attempt, self.host.now))

    def release(self, message: Release) -> None:
        """Decode reads no more of this attempt."""
        self._end(self.deliveries.release(message.request_id, message.attempt, self.host.now))
        self._wake()

    def housekeep(self) -> None:
        """Gives up what nobody released."""
        now = self.host.now
        if self._shares.expired(now):
            self.deliveries.release_expired(now)
            self._wake()
        self.host.lender.give_back_expired(now)

    @property
    def busy_s(self) -> float:
        """How long its engine has computed."""
        under_way_s = self.host.world.queue.now - self._begun_at if self._step is not None else 0.0
        return self.host.busy_s + under_way_s

    def hand_over(self) -> None:
        """It goes: the ingresses plan these prompts anew."""
        for key in list(self._answers):
            self._fail(key, NoReplica("this prefill replica is draining"))

    def advance(self) -> None:
        """Steps of prefill are never skipped."""

    def set_speed(self, speed: float) -> None:
        """Of the steps that begin from now on."""
        self.host.speed = speed

    def die(self) -> None:
        """Whoever waits for an answer hears that nobody is there."""
        for key in list(self._answers):
            self._fail(key, PeerLost("the prefill replica is gone"))

    # ---- the engine ---------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._step is not None or not self.host.alive:
            return
        step, outgoing = self.deliveries.next_step(self.host.now)
        self._tell(outgoing)
        if step is None:
            return
        self._step = step
        work = StepWork(chunks=tuple((c.num_tokens, c.job.sequence.num_launched - c.num_tokens) for c in step.chunks))
        seconds = self.host.cost.step_s(work) / self.host.speed
        queue, number = self.host.world.queue, self.host.number
        begun_at = self._begun_at = queue.now
        for done, (first, num) in enumerate(self._groups[:-1], start=1):
            queue.at(
                begun_at + seconds * done / len(self._groups), MESSAGE, number, self._layers_done, step, first, num
            )
        queue.at(begun_at + seconds + self.host.step_gap_s, STEP_END, number, self._step_done, step, seconds)

    def _layers_done(self, step: PrefillStep, first_layer: int, num_layers: int) -> None:
        if self.host.alive:
            self._tell(self.deliveries.layers_done(step, first_layer, num_layers, self.host.now))

    def _step_done(self, step: PrefillStep, seconds: float) -> None:
        if not self.host.alive:
            return
        host, now = self.host, self.host.now
        self._layers_done(step, *self._groups[-1])
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        self._tokens_per_s.add(num_tokens / seconds)
        host.samples.add_step(step.batch, seconds)
        host.num_steps += 1
        host.busy_s += seconds
        drawn = tuple(
            self._peers.output(chunk.job.message.request_id)[chunk.job.sequence.num_outputs]
            if share.draw is not None
            else None
            for chunk, share in zip(step.chunks, step.batch.sequences, strict=True)
        )
        for prefilled, closing in self.deliveries.step_done(step, StepResult(drawn, (None,) * len(drawn)), now):
            self._answer(prefilled)
            self._tell([closing])
        self._step = None
        self._wake()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _pulled(self, message: Prefill, fetched: Fetched | None) -> None:
        if fetched is not None and message.pull_from is not None:
            self.host.samples.add_transfer(message.pull_from.replica_id, fetched.num_bytes, fetched.seconds)
        self._accept_pulled(message)

    def _accept_pulled(self, message: Prefill) -> None:
        """Its prefix is there, or nobody waits for it any longer."""
        key = message.request_id, message.attempt
        if key in self._pulling and self.host.alive:
            self._pulling.discard(key)
            self._accept(message)

    def _accept(self, message: Prefill) -> None:
        key = message.request_id, message.attempt
        if key not in self._answers:
            return  # cancelled while its prefix came
        try:
            self.deliveries.accept(message, self.host.now)
        except BatonError as error:
            self._fail(key, error)
            return
        self._wake()

    def _answer(self, prefilled: Prefilled) -> None:
        job = prefilled.job
        answer = self._answers.pop(job.key, None)
        if answer is None:
            return
        times = job.started_at - job.arrived_at, self.host.now - job.started_at
        cached = job.sequence.num_cached
        self.host.num_prompt_tokens += job.sequence.num_prompt
        self.host.num_cached_tokens += cached
        first = FirstToken(prefilled.token_id, None, prefilled.finish_reason, cached, *times)
        self.host.world.wire.tell(self.host.number, self._peers.ingress(job.key[0]), answer[0], first)

    def _fail(self, key: Key, error: BatonError) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None:
            self.host.world.wire.fail(self.host, answer[1], error)

    def _end(self, dropped: list[Outgoing]) -> None:
        for outgoing in dropped:
            self._fail(outgoing.job.key, StaleMessage("the attempt was cancelled"))
        self._tell(dropped)

    def _tell(self, outgoing: list[Outgoing]) -> None:
        wire, number = self.host.world.wire, self.host.number
        for one in outgoing:
            decode, message = self._peers.decode(one.job.message.ticket.decode), one.message
            match message:
                case Announce():
                    wire.tell(number, decode.host, decode.announce, message, failed=partial(self._untold, one))
                case Commit():
                    wire.tell(number, decode.host, decode.commit, message, failed=partial(self._untold, one))
                case Abandon():
                    wire.tell(number, decode.host, decode.abandon, message)

    def _untold(self, outgoing: Outgoing, error: BatonError) -> None:
        """A decode replica that refuses or is lost ends the attempt; the ingress plans anew."""
        key = outgoing.job.key
        self._fail(key, PeerLost(f"decode: {error}", field="decode"))
        self._end(self.deliveries.cancel(*key, self.host.now))

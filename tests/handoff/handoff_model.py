"""Two replicas' books, the wires between them, and memory that remembers what was written where.

Prefill's and decode's production books run against tiny pools whose "KV" is the token prefix itself. Messages arrive
in any order, fetches copy at their last moment, steps write at their end even when their request is long cancelled.
At every step of decode, each position must hold exactly its own prefix: a block reused one moment too early fails.
"""

from collections import defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.block_hash import chain_seed, hash_blocks
from core.errors import Overloaded, StaleMessage
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_decode import Abandon, Announce, Commit, Open, Sequence
from core.messages.to_prefill import Prefill, Release
from core.messages.to_rank import Fetched
from core.sampling import SamplingParams
from decode_worker.handoffs import Handoffs
from decode_worker.scheduler import DecodeScheduler
from engine.block_pool import BlockPool
from kv_transfer.lease_book import LeaseBook
from kv_transfer.share_book import ShareBook
from prefill_worker.deliveries import Deliveries
from prefill_worker.scheduler import PrefillScheduler
from tests.handoff.token_memory import BLOCK, PLAIN, WINDOWED, Memory, Prefixed, draw


def info(name: str, role: Role, layout: KVLayout, num_blocks: int) -> ReplicaInfo:
    same = Compatibility("m", "r", "float32", BLOCK, "h")
    return ReplicaInfo(name, role, 1, (name,), layout, same, num_blocks, 3, 4, 64)


class HandoffModel(RuleBasedStateMachine):
    layout = PLAIN
    num_blocks = 9

    def __init__(self) -> None:
        super().__init__()
        layout, size = self.layout, self.num_blocks
        self.now = 0.0
        self.prefill_info, self.decode_info = (
            info(name, role, layout, size) for name, role in (("p", Role.PREFILL), ("d", Role.DECODE))
        )
        self.prefill_pool, self.decode_pool = BlockPool(size), BlockPool(size)
        self.jobs = PrefillScheduler(self.prefill_pool, layout, 3, 4, 8)
        self.deliveries = Deliveries(self.prefill_info, self.prefill_pool, self.jobs, ShareBook(BLOCK, ttl_s=1e9))
        self.batch = DecodeScheduler(self.decode_pool, 3, 4)
        book = LeaseBook(layout.kv_groups, ttl_s=1e9)
        self.handoffs = Handoffs(self.decode_pool, layout, book, self.batch, 6, 4)
        self.prefill_memory, self.decode_memory = Memory(layout), Memory(layout)
        self.wire: list[object] = []
        self.fetches: list[object] = []
        self.prefill_step = self.decode_step = None
        self.layers_told = 0
        self.attempts: dict[str, int] = defaultdict(lambda: -1)
        self.joined = self.shared = self.orphaned = 0

    # ---- the ingress --------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from("abcd"),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 4),
        local=st.sampled_from([False, False, False, True]),
    )
    def request(self, name, tokens, max_tokens, local):
        self.attempts[name] += 1
        tokens = tuple(tokens)
        sequence = Sequence(
            tokens, hash_blocks(tokens, BLOCK), SamplingParams(max_tokens, temperature=0.0), chain_seed()
        )
        source = None if local else self.prefill_info
        try:
            handoff = self.handoffs.open(Open(name, self.attempts[name], "i", sequence, source, 9.0), self.now)
        except Overloaded:
            return
        if not local:
            self.wire.append(Prefill(*handoff.key, sequence, handoff.ticket(self.decode_info), 9.0))
        self.settle()

    @rule(name=st.sampled_from("abcd"), on_decode=st.booleans())
    def cancel(self, name, on_decode):
        if self.attempts[name] < 0:
            return
        if on_decode:
            self.handoffs.end(name, self.attempts[name], self.now)
            self.settle()
        elif self.impatient():
            self.handoffs.stop_waiting(self.now, 0.0)
            self.settle()
        else:
            self.send(self.deliveries.cancel(name, self.attempts[name], self.now))

    # ---- the wire -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), twice=st.booleans())
    def deliver(self, data, twice):
        message = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        for _ in range(1 + (twice and not isinstance(message, Prefill))):
            self.receive(message)

    def receive(self, message) -> None:
        try:
            match message:
                case Prefill():
                    self.deliveries.accept(message, self.now)
                case Announce():
                    fetch = self.handoffs.announce(message, self.now)
                    if fetch is not None:
                        self.fetches.append(fetch)
                case Commit():
                    self.handoffs.commit(message, self.now)
                case Abandon():
                    handoff = self.handoffs.find(message.request_id, message.attempt)
                    if handoff is not None and handoff.lease.lease_id == message.lease_id:
                        self.handoffs.end(message.request_id, message.attempt, self.now)
                case Release():
                    self.send(self.deliveries.release(message.request_id, message.attempt, self.now))
        except (StaleMessage, Overloaded):
            pass
        self.settle()

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def end_fetch(self, data, fails):
        fetch = self.fetches.pop(data.draw(st.integers(0, len(self.fetches) - 1)))
        announce = fetch.announce
        for source, target in zip(announce.source_blocks, fetch.destination_blocks, strict=True):
            for layer in range(announce.first_layer, announce.first_layer + announce.num_layers):
                for slot in range(BLOCK):
                    cell = self.prefill_memory.cells.get((layer, source, slot), ())
                    self.decode_memory.cells[layer, target, slot] = ("garbage",) if fails else cell
        if fails:
            self.handoffs.fetch_failed(fetch.handoff, announce.number, self.now)
        else:
            self.handoffs.fetched(fetch.handoff, announce.number, Fetched(1, 0.0), self.now)
        self.settle()

    # ---- the engines --------------------------------------------------------------------------------------------

    @rule()
    def prefill_forward(self):
        """Starts a step, tells its next layer, or ends it."""
        if self.prefill_step is None:
            step, outgoing = self.deliveries.next_step(self.now)
            self.send(outgoing)
            if step is not None:
                shares = zip(step.batch.sequences, step.chunks, strict=True)
                self.prefill_step = step, [Prefixed(s, c.job.sequence.token_ids) for s, c in shares]
                self.layers_told = 0
            return
        step, sequences = self.prefill_step
        if self.layers_told < self.layout.num_layers:
            if self.layers_told == 0:
                for sequence in sequences:
                    self.prefill_memory.write_step(sequence)
            self.send(self.deliveries.layers_done(step, self.layers_told, 1, self.now))
            self.layers_told += 1
            return
        for sequence in sequences:
            self.prefill_memory.write_step(sequence)
        self.prefill_step = None
        for _, closing in self.deliveries.step_done(step, draw(sequences), self.now):
            self.send([closing])

    @rule()
    def decode_forward(self):
        if self.decode_step is None:
            step = self.batch.schedule()
            for outcome in self.batch.take_preempted():
                self.handoffs.end(outcome.job.request_id, outcome.job.attempt, self.now)
            if step is not None:
                shares = zip(step.batch.sequences, step.advances, strict=True)
                self.decode_step = step, [Prefixed(s, a.job.sequence.token_ids) for s, a in shares]
            self.settle()
            return
        step, sequences = self.decode_step
        for sequence, advance in zip(sequences, step.advances, strict=True):
            if not advance.job.cancelled:
                self.decode_memory.check(sequence)
            self.decode_memory.write_step(sequence)
        self.decode_step = None
        for outcome in self.batch.finish(step, draw(sequences)):
            assert outcome.first_index < outcome.job.sequence.sampling.max_tokens
            if outcome.finish_reason is not None:
                self.handoffs.end(outcome.job.request_id, outcome.job.attempt, self.now)
        self.settle()

    # ---- plumbing -----------------------------------------------------------------------------------------------

    def send(self, outgoing) -> None:
        self.wire += [one.message for one in outgoing]

    def impatient(self) -> bool:
        """Whether some request waits for another's transfer although its own prefill is done."""
        return any(handoff.shared.owed and handoff.lease.commit for handoff in self.handoffs)

    def settle(self) -> None:
        for handoff in self.handoffs.take_owed():
            self.orphaned += 1
            self.borrow(handoff)
        self.wire += [Release(h.request_id, h.message.attempt) for h in self.handoffs.take_releasable()]
        for handoff in self.handoffs.take_joined():
            self.joined += 1
            self.shared += handoff.shared.num_awaited
            assert handoff.sequence.num_uncomputed >= 1

    def borrow(self, handoff) -> None:
        """What another's transfer still owes comes from the source's cache, if it is there and decode has room."""
        hashes = [h for _, h in handoff.shared.owed if not self.decode_pool.match([h])]
        sources = self.prefill_pool.match(hashes)
        if len(sources) == len(hashes) <= self.decode_pool.num_free:
            blocks = self.decode_pool.allocate(len(hashes))
            for block_hash, source, target in zip(hashes, sources, blocks, strict=True):
                for place in range(self.layout.num_places):
                    for slot in range(BLOCK):
                        cell = self.prefill_memory.cells.get((place, source, slot), ())
                        self.decode_memory.cells[place, target, slot] = cell
                self.decode_pool.register(target, block_hash, None)
            self.decode_pool.disown(blocks)
        if not self.handoffs.claim(handoff, self.now):
            self.handoffs.end(handoff.request_id, handoff.message.attempt, self.now)

    @invariant()
    def books_balance(self):
        self.handoffs.validate()
        self.deliveries.validate()

    def teardown(self):
        """Whatever happened, once all is delivered and done nothing is held on either side."""
        for name in self.attempts:
            self.handoffs.end(name, self.attempts[name], self.now)
        self.settle()
        for _ in range(400):
            if not (self.wire or self.fetches or self.prefill_step or self.decode_step or len(self.deliveries)):
                break
            while self.wire:
                self.receive(self.wire.pop(0))
            while self.fetches:
                fetch = self.fetches.pop(0)
                self.handoffs.fetched(fetch.handoff, fetch.announce.number, Fetched(1, 0.0), self.now)
                self.settle()
            self.prefill_forward()
            if self.decode_step is not None:
                self.decode_forward()
        assert len(self.handoffs) == 0 and len(self.deliveries) == 0
        assert self.decode_pool.num_held == 0 and self.prefill_pool.num_held == 0
        assert self.decode_pool.num_promised == 0


class WindowedHandoffModel(HandoffModel):
    """Layers with windows of two sizes among those without one, in one pool."""

    layout = WINDOWED
    num_blocks = 22

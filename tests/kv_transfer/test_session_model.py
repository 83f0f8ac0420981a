"""Every interleaving of a sender, its fence and a receiver that restarts and reconnects, over wires without tags.

A wire matches slabs by order alone, as NCCL does: a grant obeyed on the wrong channel puts a right-looking slab into
the wrong place. Control messages arrive in any order, twice, or not at all; what lands must be what was asked for.
"""

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest

from core.errors import StaleMessage
from core.kv_layout import Compatibility, KVLayout
from core.messages.to_rank import CloseChannel, Connect, Ready, SlabHeader, Span
from kv_transfer.session import SenderSession

LAYOUT = KVLayout(1, 1, 1, 1, "float32", 1)
WEIGHTS = {"connect": 6, "grant": 20, "deliver": 40, "answer": 40, "land": 30, "fail": 1, "restart": 4}
SAME = Compatibility("m", "r", "float32", 1, "h")


@dataclass
class Receiver:
    """One incarnation: what it asked for on its present channel, and what it expects to land, in order."""

    incarnation: int
    generation: int = 0
    next_sequence: int = 0
    is_connected: bool = False
    posted: deque[tuple[SlabHeader, int]] = field(default_factory=deque)


class SessionModel:
    """Content of a slab is its request's number; memory says what landed for whom."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.session = SenderSession("d")
        self.receiver = Receiver(1)
        self.control: list[object] = []  # messages under way to the sender
        self.answers: list[tuple[object, bool]] = []  # (message, accepted) under way back
        self.wires: dict[tuple[int, int], deque[str]] = {}  # by (incarnation, generation)
        self.next_request = 0
        self.num_landed = self.num_stale = 0

    def step(self) -> None:
        (action,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        getattr(self, action)()

    def connect(self) -> None:
        """The receiver gives its channel up, if any, and asks for the next generation."""
        me = self.receiver
        if me.is_connected and self.random.random() < 0.7:
            return
        if me.generation:
            self.control.append(CloseChannel("d", me.incarnation, me.generation))
        me.generation += 1
        me.next_sequence, me.is_connected = 0, False
        me.posted.clear()
        self.control.append(Connect("d", me.incarnation, me.generation, SAME, LAYOUT))

    def grant(self) -> None:
        me = self.receiver
        if not me.is_connected or self.waits_for_answer():
            return
        headers = []
        for _ in range(self.random.randint(1, 3)):
            self.next_request += 1
            headers.append(
                SlabHeader(me.next_sequence + len(headers), f"r{self.next_request}", 1, Span(0, 1, (0,), 0, 1))
            )
        self.control.append(Ready("d", me.incarnation, me.generation, tuple(headers)))

    def waits_for_answer(self) -> bool:
        """One grant at a time, as the real receiver does."""
        me = self.receiver
        mine = [m for m in (*self.control, *(m for m, _ in self.answers)) if isinstance(m, Ready)]
        return any((m.receiver_incarnation, m.generation) == (me.incarnation, me.generation) for m in mine)

    def deliver(self) -> None:
        """Any message under way reaches the sender; some come twice, some never."""
        if not self.control:
            return
        message = self.control.pop(self.random.randrange(len(self.control)))
        fate = self.random.random()
        for _ in range(0 if fate < 0.05 else 2 if fate < 0.2 else 1):
            self.receive(message)

    def receive(self, message) -> None:
        accepted = True
        try:
            match message:
                case Connect():
                    if self.session.connect(message):
                        self.wires[message.receiver_incarnation, message.generation] = deque()
                case Ready():
                    for header in self.session.ready(message):
                        self.wire().append(header.request_id)
                case CloseChannel():
                    self.session.close(message)
        except StaleMessage:
            self.num_stale += 1
            accepted = False
        self.answers.append((message, accepted))

    def wire(self) -> deque[str]:
        """Of the channel that the sender has open."""
        return self.wires[self.session.incarnation, self.session.generation]

    def answer(self) -> None:
        """The receiver learns what became of a message, if it still cares."""
        if not self.answers:
            return
        message, accepted = self.answers.pop(self.random.randrange(len(self.answers)))
        me = self.receiver
        is_mine = (message.receiver_incarnation, message.generation) == (me.incarnation, me.generation)
        if isinstance(message, CloseChannel) or not is_mine:
            return
        if not accepted:
            me.is_connected = False
        elif isinstance(message, Connect):
            me.is_connected = True
        elif message.slabs[0].sequence == me.next_sequence:
            me.next_sequence += len(message.slabs)
            me.posted.extend((header, me.generation) for header in message.slabs)

    def land(self) -> None:
        """The next slab of the receiver's wire meets its next posted fetch."""
        me = self.receiver
        wire = self.wires.get((me.incarnation, me.generation), ())
        if me.posted and wire:
            (header, generation), content = me.posted.popleft(), wire.popleft()
            assert generation == me.generation
            assert content == header.request_id, f"{content} landed where {header.request_id} was asked for"
            self.num_landed += 1

    def fail(self) -> None:
        """The sender loses the channel."""
        self.session.end()

    def restart(self) -> None:
        """A new process at the same address; generations begin anew, messages of the old one are still under way."""
        self.receiver = Receiver(self.receiver.incarnation + 1)


def run(seeds: int, steps: int = 400) -> tuple[int, int]:
    landed = stale = 0
    for seed in range(seeds):
        model = SessionModel(seed)
        for _ in range(steps):
            model.step()
        landed, stale = landed + model.num_landed, stale + model.num_stale
    return landed, stale


def test_every_slab_lands_where_it_was_asked_for():
    landed, stale = run(200)
    print(f"{landed} slabs landed, {stale} stale messages refused")
    assert landed > 1000 and stale > 200


def ignore_generation(monkeypatch):
    def is_this(self, message):
        return self.is_open and self.incarnation == message.receiver_incarnation

    monkeypatch.setattr(SenderSession, "_is_this", is_this)


def ignore_incarnation(monkeypatch):
    def is_this(self, message):
        return self.is_open and self.generation == message.generation

    monkeypatch.setattr(SenderSession, "_is_this", is_this)


def obey_repeated_grants(monkeypatch):
    ready = SenderSession.ready

    def again(self, message):
        return ready(self, message) or message.slabs

    monkeypatch.setattr(SenderSession, "ready", again)


@pytest.mark.parametrize("mutation", [ignore_generation, ignore_incarnation, obey_repeated_grants])
def test_the_model_catches(mutation, monkeypatch):
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="landed where"):
        run(1500)

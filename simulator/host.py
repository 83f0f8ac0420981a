"""What both roles of a replica share: identity, clock, block pool, speed, loans, and how it tells of itself. Pure."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from core.messages.fleet import ReplicaInfo
from core.messages.to_lender import Borrow, Lent
from core.messages.to_scheduler import ReplicaStatus
from engine.block_pool import BlockPool
from simulator.cost.cost_model import CostModel
from simulator.events import EventQueue
from simulator.network import Network
from simulator.wire import Wire
from worker.lender import Lender
from worker.samples import Samples


@dataclass(frozen=True)
class World:
    """What all processes of a simulated fleet live in."""

    queue: EventQueue
    wire: Wire
    network: Network


class StepLoop(Protocol):
    """What changes a replica's blocks all by itself."""

    def advance(self) -> None:
        """Brings the blocks to this moment."""
        ...

    def changed(self) -> None:
        """There may be other blocks to go on with."""
        ...


class Host:
    """One incarnation of a replica."""

    def __init__(
        self,
        world: World,
        number: int,
        info: ReplicaInfo,
        cost: CostModel,
        speed: float,
        rest_timeout_s: float,
        step_gap_s: float = 0.0,
    ) -> None:
        self.world = world
        self.number = number
        self.info = info
        self.cost = cost
        self.speed = speed
        self.step_gap_s = step_gap_s
        self.pool = BlockPool(info.num_blocks)
        self.lender = Lender(info, self.pool, rest_timeout_s)
        self.alive = True
        self.draining = False
        self.lies = False
        self.clock_offset_s = 0.0
        self.samples = Samples()
        self.num_steps = 0
        self.busy_s = 0.0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.steps: StepLoop | None = None  # of a replica that may compute ahead; set before it computes anything

    @contextmanager
    def touching_blocks(self) -> Iterator[None]:
        """Around a change of its pool that its own role did not ask for: steps that are over come first, and those
        computed ahead go on with what is left.
        """
        if self.steps is not None:
            self.steps.advance()
        try:
            yield
        finally:
            if self.steps is not None:
                self.steps.changed()

    @property
    def now(self) -> float:
        """On this replica's own clock."""
        return self.world.queue.now + self.clock_offset_s

    def block_bytes(self, num_layers: int) -> int:
        """Of so many layers of one block, on all ranks."""
        layout = self.info.layout
        return layout.block_bytes_per_rank * layout.tensor_parallel * num_layers // layout.num_places

    def told(self, status: ReplicaStatus) -> ReplicaStatus:
        """What it says of its load."""
        if not self.lies:
            return status
        return replace(
            status,
            num_waiting=0,
            num_running=0,
            num_waiting_tokens=0,
            num_free_blocks=self.info.num_blocks,
            num_kv_tokens=0,
        )

    def lend(self, message: Borrow) -> Lent:
        """Another replica wants what is cached here."""
        with self.touching_blocks():
            return self.lender.lend(message, self.now)

    def give_back(self, loan_id: str) -> None:
        """It has it, or will not fetch it."""
        with self.touching_blocks():
            self.lender.give_back(loan_id, self.now)

"""Runs engine steps on threads of their own, so that JIT, loading and long steps never starve an RPC answer.

One thread launches steps, another collects them: the next step is launched while one is in flight.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TypeVar

from core.config import TransferConfig
from engine.batch import StepBatch, StepResult
from engine.layer_groups import layer_groups
from engine.runner import InFlightStep, ModelRunner

Result = TypeVar("Result")


@dataclass(frozen=True)
class LayersComputed:
    """A group of layers of one step. Moments are of the monotonic clock, taken on the engine's thread."""

    first_layer: int
    num_layers: int
    begun_at: float
    ended_at: float


@dataclass(frozen=True)
class Executed:
    """A step's result; after its layers it drew tokens from `drawn_from` on."""

    result: StepResult
    drawn_from: float
    ended_at: float


OnLayers = Callable[[LayersComputed], None]


class EngineThread:
    """Steps in the order of their calls; counters tell how many, and how long the present one has taken."""

    def __init__(self, transfer: TransferConfig | None) -> None:
        """`transfer` tells which layers are announced together; None: nothing leaves this rank layer by layer."""
        self.runner: ModelRunner | None = None  # made on this thread, by `run`
        self.num_steps = 0
        self._transfer = transfer
        self._busy_since: dict[int, float] = {}  # by thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._collecting = ThreadPoolExecutor(1, thread_name_prefix="collect")

    @property
    def busy_s(self) -> float:
        """Seconds since the oldest call in progress began; 0 when idle, or waiting for the first rank."""
        return max((time.monotonic() - since for since in [*self._busy_since.values()]), default=0.0)

    async def execute(self, batch: StepBatch, on_layers: OnLayers) -> Executed:
        """Launches and collects one step. `on_layers` is called on the event loop."""
        loop, runner = asyncio.get_running_loop(), self.runner
        assert runner is not None
        groups = self._layer_groups(batch, runner.layout.num_layers)
        moments: list[float] = []

        def layers_done(first_layer: int, num_layers: int) -> None:
            moments.append(time.monotonic())
            loop.call_soon_threadsafe(on_layers, LayersComputed(first_layer, num_layers, *moments[-2:]))

        def launch() -> Future[Executed]:
            moments.append(time.monotonic())
            return self._collecting.submit(collect, runner.launch(batch, layers_done, groups))

        def collect(step: InFlightStep) -> Executed:
            with self._busy():
                result = runner.collect(step)
            return Executed(result, moments[-1], time.monotonic())

        executed = await asyncio.wrap_future(await self.run(launch))
        self.num_steps += 1
        return executed

    async def keep_alive(self) -> None:
        """Tells idle follower ranks that the replica lives."""
        assert self.runner is not None
        await self.run(self.runner.keep_alive)

    async def follow(self) -> None:
        """Executes what the first rank launches until that closes. Raises PeerLost."""
        runner = self.runner
        assert runner is not None

        def work() -> None:
            for batch in runner.launches():
                with self._busy():
                    runner.execute_launched(batch)
                self.num_steps += 1

        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs anything else that must not overlap a step."""

        def timed() -> Result:
            with self._busy():
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)

    def close(self, last: Callable[[], None]) -> None:
        """Waits for the step in flight, does one last thing and ends the thread."""
        self._thread.submit(last)
        self._thread.shutdown(wait=True)
        self._collecting.shutdown(wait=True)

    def _layer_groups(self, batch: StepBatch, num_layers: int) -> tuple[int, ...]:
        """Small ones at the end of a step that ends a prompt, since nothing is computed beside their transfer."""
        transfer = self._transfer
        if transfer is None:
            return (num_layers,)
        ends_prompt = any(sequence.draw is not None for sequence in batch.sequences)
        last = transfer.last_layers_per_group if ends_prompt else None
        return layer_groups(num_layers, transfer.layers_per_group, last)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since[get_ident()] = time.monotonic()
        try:
            yield
        finally:
            del self._busy_since[get_ident()]

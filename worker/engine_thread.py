"""Runs engine steps on a thread of their own, so that JIT, loading and long steps never starve an RPC answer."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from engine.batch import StepBatch, StepResult
from engine.runner import ModelRunner

Result = TypeVar("Result")

OnLayers = Callable[[int, int], None]


class EngineThread:
    """One step at a time; counters tell how many, and how long the present one has taken."""

    def __init__(self, layers_per_group: int) -> None:
        self.runner: ModelRunner | None = None  # made on this thread, by `run`
        self.num_steps = 0
        self._layers_per_group = layers_per_group
        self._busy_since = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def busy_s(self) -> float:
        """Seconds since the call in progress began; 0 when idle, or waiting for the first rank."""
        return time.monotonic() - self._busy_since if self._busy_since else 0.0

    async def execute(self, batch: StepBatch, on_layers: OnLayers | None = None) -> StepResult:
        """Launches and collects one step. `on_layers` is called on the event loop."""
        loop, runner = asyncio.get_running_loop(), self.runner
        assert runner is not None

        def layers_done(first_layer: int, num_layers: int) -> None:
            if on_layers is not None:
                loop.call_soon_threadsafe(on_layers, first_layer, num_layers)

        def step() -> StepResult:
            notify = layers_done if on_layers is not None else None
            return runner.collect(runner.launch(batch, notify, self._layers_per_group))

        result = await self.run(step)
        self.num_steps += 1
        return result

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

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = 0.0

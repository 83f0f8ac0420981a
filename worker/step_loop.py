"""The loop of a replica's first rank: schedule, execute, deliver; asleep while there is nothing to do.

With `steps_in_flight` 2 the next step is scheduled and launched while one is computed:

    schedule   | n |     | n + 1 |     | n + 2 |
    device         |    n    |     n + 1   |    n + 2
    deliver                  | n |         | n + 1 |
"""

import asyncio
import time
from typing import Generic, Protocol, TypeVar

from core.messages.to_rank import TimelineEvent
from engine.batch import StepBatch, StepResult
from kv_transfer.timeline import Timeline
from worker.engine_thread import EngineThread, LayersComputed

KEEP_ALIVE_S = 2.0


class Step(Protocol):
    """What a role's scheduler returns."""

    @property
    def batch(self) -> StepBatch:
        """The tokens to compute."""
        ...

    @property
    def prompts(self) -> tuple[tuple[str, int], ...]:
        """(request id, attempt) of the requests whose prompts it computes a part of."""
        ...


StepType = TypeVar("StepType", bound=Step)


class Steps(Protocol[StepType]):
    """A role's part in the loop; all calls come from the event loop's thread."""

    def next_step(self) -> StepType | None:
        """Schedules, or None when nothing can run."""
        ...

    def layers_done(self, step: StepType, first_layer: int, num_layers: int) -> None:
        """KV of these layers is written for the whole batch, on every rank."""
        ...

    def step_done(self, step: StepType, result: StepResult, seconds: float) -> None:
        """Takes the result in."""
        ...

    def step_failed(self, step: StepType) -> None:
        """The engine raised; its writes have ended."""
        ...


class StepLoop(Generic[StepType]):
    """Drives one engine with one role's steps until cancelled.

    The timeline is told when prompts are computed; single tokens of decoding would soon fill it.
    """

    def __init__(
        self, engine: EngineThread, steps: Steps[StepType], timeline: Timeline, steps_in_flight: int = 1
    ) -> None:
        self._engine = engine
        self._steps = steps
        self._timeline = timeline
        self._steps_in_flight = steps_in_flight
        self._wake = asyncio.Event()
        self._executing: set[asyncio.Task[None]] = set()
        self._ended_at = 0.0

    @property
    def in_flight(self) -> bool:
        """A step writes blocks until its result is there."""
        return any(not task.done() for task in self._executing)

    def wake(self) -> None:
        """Something may have become runnable."""
        self._wake.set()

    async def run(self) -> None:
        """Ends by cancellation, or by raising what the engine raised."""
        try:
            while True:
                self._wake.clear()
                while len(self._executing) < self._steps_in_flight and (step := self._steps.next_step()) is not None:
                    self._executing.add(asyncio.create_task(self._execute(step)))
                await self._sleep()
                for task in [task for task in self._executing if task.done()]:
                    self._executing.discard(task)
                    task.result()
        finally:
            for task in self._executing:
                task.cancel()

    async def _execute(self, step: StepType) -> None:
        started = time.monotonic()

        def layers_done(layers: LayersComputed) -> None:
            self._note(step, "compute", layers.begun_at, layers.ended_at)
            self._steps.layers_done(step, layers.first_layer, layers.num_layers)

        try:
            executed = await self._engine.execute(step.batch, layers_done)
        except Exception:
            self._steps.step_failed(step)
            raise
        else:
            self._note(step, "draw", executed.drawn_from, executed.ended_at)
            seconds = executed.ended_at - max(started, self._ended_at)  # without the wait for the step before
            self._ended_at = executed.ended_at
            self._steps.step_done(step, executed.result, seconds)
        finally:
            self._wake.set()

    def _note(self, step: StepType, phase: str, begun_at: float, ended_at: float) -> None:
        for request_id, attempt in step.prompts:
            self._timeline.add(TimelineEvent(request_id, attempt, phase, "", begun_at, ended_at, 0))

    async def _sleep(self) -> None:
        """Until a step is over or something may have become runnable; other ranks hear that this one lives."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await self._wake.wait()
        except TimeoutError:
            if not self._executing:
                await self._engine.keep_alive()

"""The step loop of a decode replica on the virtual clock, which computes quiet steps ahead and skips over them. Pure.

    time     t0      t1      t2      t3             quiet steps: their ends are known when the first begins
             | skipped       | under way            somebody looks at the replica here: it stands at t2, with the
                               ^ now                blocks of the step under way taken, as if each step had been run

Whoever touches the replica calls `advance` first, and `changed` afterwards: the rest of the plan is kept as long as
nobody joins or leaves and blocks suffice.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from decode_worker.scheduler import DecodeJob, DecodeScheduler, DecodeStep, Outcome
from engine.batch import StepResult
from simulator.cost.cost_model import StepWork
from simulator.decode_tokens import DecodeTokens
from simulator.events import STEP_END
from simulator.host import Host
from worker.rates import MovingAverage
from worker.samples import KEPT

MOST_AHEAD = 512  # steps


@dataclass(slots=True)
class _Plan:
    """Quiet steps: the first `num_done` are over, the next one is under way. `ends` lie a gap after the seconds."""

    begun_at: float
    seconds: list[float]
    ends: list[float]
    num_done: int = 0

    @property
    def step_begun_at(self) -> float:
        """Of the step under way."""
        return self.ends[self.num_done - 1] if self.num_done else self.begun_at


class DecodeEngine:
    """One step at a time."""

    def __init__(self, host: Host, scheduler: DecodeScheduler, tokens: DecodeTokens, skips: bool = True) -> None:
        self._host = host
        self._scheduler = scheduler
        self._tokens = tokens
        self._skips = skips
        self._plan: _Plan | None = None
        self._step: DecodeStep | None = None
        self._begun_at = 0.0  # of that
        self._version = 0  # of the plan: ends of older ones are ignored
        self.step_s = MovingAverage()  # of steps that only decode
        self.tokens_per_s = MovingAverage()  # of steps that also prefill

    @property
    def in_flight(self) -> bool:
        """A step is under way."""
        return self._plan is not None or self._step is not None

    @property
    def under_way_s(self) -> float:
        """Since the step under way began."""
        if self._plan is not None:
            return self._host.world.queue.now - self._plan.step_begun_at
        return self._host.world.queue.now - self._begun_at if self._step is not None else 0.0

    def advance(self) -> None:
        """Brings the replica to this moment."""
        plan = self._plan
        if plan is not None:
            num_steps = bisect_right(plan.ends, self._host.world.queue.now, lo=plan.num_done) - plan.num_done
            if 0 < num_steps < len(plan.ends) - plan.num_done:
                self._skip(plan, num_steps)
                self._scheduler.begin_quiet_step()

    def changed(self) -> None:
        """After a touch: somebody may wait to join, or blocks may be gone."""
        plan, scheduler = self._plan, self._scheduler
        if not self.in_flight:
            self._next()
        elif plan is not None and plan.num_done + 1 < len(plan.ends):
            joins = scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs
            if joins or not scheduler.has_blocks_for(len(plan.ends) - plan.num_done):
                self.replan()

    def replan(self) -> None:
        """Only the step under way stays as it was planned: the others may take another time, or not come."""
        plan = self._plan
        if plan is not None and plan.num_done + 1 < len(plan.ends):
            end = plan.num_done + 1
            del plan.ends[end:], plan.seconds[end:]
            self._await_end(plan)

    def before_cancel(self, job: DecodeJob) -> None:
        """A running job will leave while a step is under way: that becomes a step of its own, which ends as planned."""
        plan = self._plan
        if plan is None or job not in self._scheduler.running:
            return
        step = self._scheduler.launch()
        assert step is not None
        seconds, end = plan.seconds[plan.num_done], plan.ends[plan.num_done]
        self._plan, self._step, self._begun_at = None, step, plan.step_begun_at
        self._version += 1
        self._at_end(end, self._step_done, step, seconds)

    # ---- steps --------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        if not self._host.alive:
            return
        scheduler, now = self._scheduler, self._host.world.queue.now
        scheduler.admit()
        num_steps = scheduler.num_quiet_steps(MOST_AHEAD) if self._skips and not self._tokens.must_step() else 0
        if num_steps:
            seconds = self._seconds_of(num_steps)
            ends = np.add.accumulate(np.concatenate(([now], seconds + self._host.step_gap_s)))[1:]
            self._plan = _Plan(now, seconds.tolist(), ends.tolist())
            scheduler.begin_quiet_step()
            self._await_end(self._plan)
            return
        step = scheduler.schedule()
        if scheduler.preempted:
            self._tokens.deliver(scheduler.take_preempted())
        if step is not None and self._step is None:
            self._step, self._begun_at = step, now
            seconds_of_step = self._host.cost.step_s(_work(step)) / self._host.speed
            self._at_end(now + (seconds_of_step + self._host.step_gap_s), self._step_done, step, seconds_of_step)

    def _seconds_of(self, num_steps: int) -> "np.typing.NDArray[np.float64]":
        running = self._scheduler.running
        num_kv_tokens = self._scheduler.num_kv_tokens + len(running) * np.arange(num_steps, dtype=np.int64)
        return self._host.cost.decode_steps_s(len(running), num_kv_tokens) / self._host.speed

    def _await_end(self, plan: _Plan) -> None:
        self._version += 1
        self._at_end(plan.ends[-1], self._plan_done, plan, self._version)

    def _at_end(self, time: float, action: Callable[..., None], *args: object) -> None:
        self._host.world.queue.at(time, STEP_END, self._host.number, action, *args)

    def _plan_done(self, plan: _Plan, version: int) -> None:
        if version != self._version or not self._host.alive:
            return
        outcomes = self._skip(plan, len(plan.ends) - plan.num_done)
        self._plan = None
        if outcomes:
            self._tokens.deliver(outcomes)
        if not self.in_flight:
            self._next()

    def _skip(self, plan: _Plan, num_steps: int) -> list[Outcome]:
        first, end = plan.num_done, plan.num_done + num_steps
        plan.num_done = end
        host, add = self._host, self.step_s.add
        for seconds in plan.seconds[first:end]:
            add(seconds)
            host.busy_s += seconds
        self._sample(plan.seconds[first:end])
        host.num_steps += num_steps
        self._tokens.shown(plan.ends[first:end])
        return self._scheduler.skip(num_steps, self._tokens.draw)

    def _sample(self, seconds: list[float]) -> None:
        """Of quiet steps, those that a report could still tell of."""
        num_running, steps = len(self._scheduler.running), self._host.samples.steps
        num_passed_over = max(0, len(seconds) - KEPT)
        steps.num_seen += num_passed_over
        num_kv_tokens = self._scheduler.num_kv_tokens + num_running * (num_passed_over + 1)
        for one in seconds[num_passed_over:]:
            steps.add((0, 0, num_running, num_kv_tokens, one))
            num_kv_tokens += num_running

    def _step_done(self, step: DecodeStep, seconds: float) -> None:
        if step is not self._step or not self._host.alive:
            return
        host = self._host
        host.num_steps += 1
        host.busy_s += seconds
        host.samples.add_step(step.batch, seconds)
        if all(advance.num_tokens == 1 for advance in step.advances):
            self.step_s.add(seconds)
        else:
            self.tokens_per_s.add(sum(advance.num_tokens for advance in step.advances) / seconds)
        drawn = tuple(
            self._tokens.draw(advance.job, 1)[0] if share.draw is not None else None
            for advance, share in zip(step.advances, step.batch.sequences, strict=True)
        )
        self._step = None
        self._tokens.deliver(self._scheduler.finish(step, StepResult(drawn, (None,) * len(drawn))))
        if not self.in_flight:
            self._next()


def _work(step: DecodeStep) -> StepWork:
    chunks, num_decoding, num_kv_tokens = [], 0, 0
    for advance, share in zip(step.advances, step.batch.sequences, strict=True):
        if advance.num_tokens > 1:
            chunks.append((advance.num_tokens, share.first_position))
        else:
            num_decoding += 1
            num_kv_tokens += share.first_position
    return StepWork(tuple(chunks), num_decoding, num_kv_tokens)

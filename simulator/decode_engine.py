"""The step loop of a decode replica on the virtual clock, which computes quiet steps ahead and skips over them. Pure.

Beside prompts the quiet jobs of a step are skipped, too, when that ends; one that is cancelled before makes it a step
like those of production.

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
from engine.batch import StepBatch, StepResult
from simulator.decode_tokens import DecodeTokens
from simulator.events import STEP_END
from simulator.host import Host
from simulator.quiet_steps import QuietSteps
from simulator.step_work import step_sample_of, work_of
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


@dataclass(eq=False, slots=True)
class _Step:
    """One under way: what was launched, beside jobs that are skipped over it."""

    launched: DecodeStep
    quiet: list[DecodeJob]
    begun_at: float
    seconds: float


class DecodeEngine:
    """One step at a time."""

    def __init__(self, host: Host, scheduler: DecodeScheduler, tokens: DecodeTokens, skips: bool = True) -> None:
        self._host = host
        self._scheduler = scheduler
        self._quiet = QuietSteps(scheduler)
        self._tokens = tokens
        self._skips = skips
        self._plan: _Plan | None = None
        self._step: _Step | None = None
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
        return self._host.world.queue.now - self._step.begun_at if self._step is not None else 0.0

    def advance(self) -> None:
        """Brings the replica to this moment."""
        plan = self._plan
        if plan is not None:
            num_steps = bisect_right(plan.ends, self._host.world.queue.now, lo=plan.num_done) - plan.num_done
            if 0 < num_steps < len(plan.ends) - plan.num_done:
                self._skip(plan, num_steps)
                self._quiet.begin(self._scheduler.running)

    def changed(self) -> None:
        """After a touch: somebody may wait to join, or blocks may be gone."""
        plan, scheduler = self._plan, self._scheduler
        if not self.in_flight:
            self._next()
        elif plan is not None and plan.num_done + 1 < len(plan.ends):
            joins = scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs
            if joins or not self._quiet.have_blocks(scheduler.running, len(plan.ends) - plan.num_done):
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
        plan, under_way = self._plan, self._step
        if under_way is not None and job in under_way.quiet:
            quiet, rest = self._scheduler.launch(under_way.quiet), under_way.launched
            assert quiet is not None
            batch = StepBatch((*quiet.batch.sequences, *rest.batch.sequences))
            under_way.launched, under_way.quiet = DecodeStep(batch, (*quiet.advances, *rest.advances)), []
        if plan is None or job not in self._scheduler.running:
            return
        step = self._scheduler.launch()
        assert step is not None
        self._plan = None
        self._version += 1
        self._await_step(_Step(step, [], plan.step_begun_at, plan.seconds[plan.num_done]), plan.ends[plan.num_done])

    # ---- steps --------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        if not self._host.alive:
            return
        scheduler, now = self._scheduler, self._host.world.queue.now
        scheduler.admit()
        quiet = self._quiet.jobs() if self._skips else []
        if self._tokens.must_step(quiet):
            quiet = []
        all_quiet = len(quiet) == len(scheduler.running)
        num_steps = self._quiet.count(quiet, MOST_AHEAD if all_quiet else 1)
        if num_steps and all_quiet:
            seconds = self._seconds_of(num_steps)
            ends = np.add.accumulate(np.concatenate(([now], seconds + self._host.step_gap_s)))[1:]
            self._plan = _Plan(now, seconds.tolist(), ends.tolist())
            self._quiet.begin(quiet)
            self._await_end(self._plan)
            return
        step, quiet = self._launch(quiet if num_steps else [])
        if scheduler.preempted:
            self._tokens.deliver(scheduler.take_preempted())
        if step is not None and self._step is None:
            seconds_of_step = self._host.cost.step_s(work_of(step, quiet)) / self._host.speed
            self._await_step(_Step(step, quiet, now, seconds_of_step), now + (seconds_of_step + self._host.step_gap_s))

    def _launch(self, quiet: list[DecodeJob]) -> tuple[DecodeStep | None, list[DecodeJob]]:
        """With those that it does not launch."""
        scheduler = self._scheduler
        if not quiet:
            return scheduler.launch(), []
        self._quiet.begin(quiet)
        passed_over = set(quiet)
        step = scheduler.launch([job for job in scheduler.running if job not in passed_over])
        return step or DecodeStep(StepBatch(()), ()), quiet

    def _seconds_of(self, num_steps: int) -> "np.typing.NDArray[np.float64]":
        running = self._scheduler.running
        num_kv_tokens = self._scheduler.num_kv_tokens + len(running) * np.arange(num_steps, dtype=np.int64)
        return self._host.cost.decode_steps_s(len(running), num_kv_tokens) / self._host.speed

    def _await_end(self, plan: _Plan) -> None:
        self._version += 1
        self._at_end(plan.ends[-1], self._plan_done, plan, self._version)

    def _await_step(self, step: _Step, end: float) -> None:
        self._step = step
        self._at_end(end, self._step_done, step)

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
        jobs = list(self._scheduler.running)
        self._tokens.shown(jobs, plan.ends[first:end])
        return self._quiet.skip(jobs, num_steps, self._tokens.outputs)

    def _sample(self, seconds: list[float]) -> None:
        """Of quiet steps, those that a report could still tell of."""
        num_running, steps = len(self._scheduler.running), self._host.samples.steps
        num_passed_over = max(0, len(seconds) - KEPT)
        steps.num_seen += num_passed_over
        num_kv_tokens = self._scheduler.num_kv_tokens + num_running * (num_passed_over + 1)
        for one in seconds[num_passed_over:]:
            steps.add((0, 0, num_running, num_kv_tokens, one))
            num_kv_tokens += num_running

    def _step_done(self, under_way: _Step) -> None:
        if under_way is not self._step or not self._host.alive:
            return
        host, step, quiet, seconds = self._host, under_way.launched, under_way.quiet, under_way.seconds
        host.num_steps += 1
        host.busy_s += seconds
        host.samples.steps.add(step_sample_of(step, quiet, seconds))
        num_tokens = len(quiet) + sum(advance.num_tokens for advance in step.advances)
        if num_tokens == len(quiet) + len(step.advances):
            self.step_s.add(seconds)
        else:
            self.tokens_per_s.add(num_tokens / seconds)
        drawn = tuple(
            self._tokens.draw(advance.job) if share.draw is not None else None
            for advance, share in zip(step.advances, step.batch.sequences, strict=True)
        )
        self._step = None
        outcomes = []
        if quiet:
            self._tokens.shown(quiet, [host.world.queue.now])
            outcomes = self._quiet.skip(quiet, 1, self._tokens.outputs)
        outcomes += self._scheduler.finish(step, StepResult(drawn, (None,) * len(drawn)))
        self._tokens.deliver(outcomes)
        if not self.in_flight:
            self._next()

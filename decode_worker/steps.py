"""Decode's part in the step loop: what the next step advances, and who is told what came of it."""

import logging
import time
from collections.abc import Callable

from decode_worker import token_events
from decode_worker.handoffs import Handoffs
from decode_worker.outbox import Outbox
from decode_worker.scheduler import DecodeScheduler, DecodeStep, Outcome
from engine.batch import StepResult
from worker.drainer import Drainer
from worker.rates import MovingAverage
from worker.samples import Samples

logger = logging.getLogger(__name__)


class DecodeSteps:
    """See worker.step_loop.Steps."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        handoffs: Handoffs,
        outbox: Outbox,
        drainer: Drainer,
        hand_over: Callable[[], None],
        samples: Samples,
    ) -> None:
        """`hand_over` has every open request go on elsewhere."""
        self._scheduler = scheduler
        self._handoffs = handoffs
        self._outbox = outbox
        self._drainer = drainer
        self._hand_over = hand_over
        self._samples = samples
        self.step_s = MovingAverage()  # of steps that only decode, until all sequences have a token
        self.tokens_per_s = MovingAverage()  # of steps that also prefill

    def next_step(self) -> DecodeStep | None:
        """Schedules; requests that had to make room are told to resume elsewhere."""
        step = self._scheduler.schedule()
        self._deliver(self._scheduler.take_preempted())
        return step

    def layers_done(self, step: DecodeStep, first_layer: int, num_layers: int) -> None:
        """Nothing leaves decode layer by layer."""

    def step_done(self, step: DecodeStep, result: StepResult, seconds: float) -> None:
        """Sends the step's tokens, one frame per ingress."""
        self._samples.add_step(step.batch, seconds)
        if all(advance.num_tokens == 1 for advance in step.advances):
            self.step_s.add(seconds * self._scheduler.num_steps_at_once)
        else:
            self.tokens_per_s.add(step.batch.num_tokens / seconds)
        self._deliver(self._scheduler.finish(step, result))
        self._drainer.changed()

    def step_failed(self, step: DecodeStep) -> None:
        """The engine is gone: every request here is to be resumed elsewhere."""
        self._scheduler.abort(step)
        self._hand_over()

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            job = outcome.job
            handoff = self._handoffs.find(job.request_id, job.attempt)
            if handoff is None:
                continue
            now = time.monotonic()
            is_first = handoff.times.first_token_at == 0
            if is_first:
                handoff.times.first_token_at = now
            event = token_events.advanced(handoff, outcome, is_first=is_first)
            self._outbox.put(handoff.message.ingress_id, event, now)
            if outcome.finish_reason is not None:
                extra = {"request_id": job.request_id}
                logger.info("%s after %d tokens", outcome.finish_reason, job.sequence.num_outputs, extra=extra)
                self._handoffs.end(job.request_id, job.attempt, now)
                self._drainer.changed()

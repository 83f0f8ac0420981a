"""Which sequences the next step advances: all running ones by a token, and prompt chunks within the budget. Pure.

Decoding comes before prompt chunks, older sequences before newer. When blocks run out, the newest sequence is
preempted: its client-visible rest is planned anew elsewhere ("resume"), so the oldest always gets through.

Tokens are drawn on the last stage of a pipeline, where the first stage cannot go on with them before they are known. A
step then takes a part of the sequences, and while one part is on its way through the stages, others follow it:

    2 parts, sequences a b c d       steps  [ a b ] [ c d ] [ a b ] ...
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.sampling import TokenLogprobs
from engine.batch import StepBatch, StepResult
from engine.block_pool import BlockPool
from engine.sequence import ActiveSequence


@dataclass(eq=False)
class DecodeJob:
    """One attempt that runs, or waits to run, on decode."""

    request_id: str
    attempt: int
    sequence: ActiveSequence
    cancelled: bool = False


@dataclass(frozen=True)
class Advance:
    """One job's share of a step."""

    job: DecodeJob
    num_tokens: int
    written: tuple[int, ...]  # physical


@dataclass(frozen=True)
class DecodeStep:
    """A batch and the advances behind it, in the same order."""

    batch: StepBatch
    advances: tuple[Advance, ...]

    @property
    def prompts(self) -> tuple[tuple[str, int], ...]:
        """(request id, attempt) of those that advance by more than a token: prompts prefilled here."""
        return tuple((a.job.request_id, a.job.attempt) for a in self.advances if a.num_tokens > 1)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a new output token, an end, or both. `finish_reason`: "stop", "length", "resume"."""

    job: DecodeJob
    first_index: int
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass
class DecodeScheduler:
    """Owns the running batch of one decode replica."""

    pool: BlockPool
    max_num_seqs: int
    max_num_batched_tokens: int
    num_parts: int = 1  # steps that may be in flight through the stages of a pipeline
    waiting: deque[DecodeJob] = field(default_factory=deque)
    running: list[DecodeJob] = field(default_factory=list)
    preempted: list[DecodeJob] = field(default_factory=list)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that local prefill still has to compute."""
        return sum(job.sequence.num_uncomputed - 1 for job in (*self.waiting, *self.running))

    @property
    def num_steps_at_once(self) -> int:
        """Steps that advance all running sequences by a token."""
        return max(1, min(self.num_parts, len(self.running)))

    @property
    def num_kv_tokens(self) -> int:
        """Context tokens of the running batch."""
        return sum(job.sequence.num_computed for job in self.running)

    def add(self, job: DecodeJob) -> None:
        """A sequence whose blocks hold everything before its uncomputed tokens joins."""
        self.waiting.append(job)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Drops this and lower attempts of a request; a step in flight keeps its blocks until it ends."""
        for job in (*self.waiting, *self.running):
            if job.request_id == request_id and job.attempt <= attempt:
                self.drop(job)

    def schedule(self) -> DecodeStep | None:
        """The next step, or None when nothing runs. Preemptions that it needed are reported by `take_preempted`."""
        self.admit()
        return self.launch()

    def admit(self) -> None:
        """Takes those in that wait, as far as the batch has places."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            self.running.append(self.waiting.popleft())

    def launch(self, jobs: Sequence[DecodeJob] | None = None) -> DecodeStep | None:
        """As `schedule`, of those that run already; of `jobs` alone, while the others have their token another way."""
        jobs = self.running if jobs is None else jobs
        num_others = len(self.running) - len(jobs)
        budget, num_jobs = self.max_num_batched_tokens - num_others, -(-len(jobs) // self.num_parts)
        advances: list[Advance] = []
        wanted = [(job, self._num_to_launch(job)) for job in jobs]
        decoding_first = sorted(wanted, key=lambda one: one[1] > 1)
        for job, num_wanted in decoding_first:
            if len(advances) == num_jobs:
                break
            if num_wanted > 1 and budget:
                job.sequence.acquire_computed_since()
                num_wanted = self._num_to_launch(job)
            num_tokens = min(num_wanted, budget)
            if num_tokens == 0 or job.cancelled or not self._make_room(job, num_tokens, advances, jobs):
                continue
            budget -= num_tokens
            written = tuple(job.sequence.blocks_written_by(num_tokens))
            self.pool.begin_write(written)
            advances.append(Advance(job, num_tokens, written))
        if not advances:
            return None
        launched = (a.job.sequence.launch(a.num_tokens, number) for number, a in enumerate(advances))
        return DecodeStep(StepBatch(tuple(launched)), tuple(advances))

    def finish(self, step: DecodeStep, result: StepResult) -> list[Outcome]:
        """Takes a step's result in; a job that ended has left the batch."""
        outcomes = []
        for advance, token_id, logprobs in zip(step.advances, result.token_ids, result.logprobs, strict=True):
            self.pool.end_write(advance.written)
            job = advance.job
            if job.cancelled:
                continue
            job.sequence.advance(advance.num_tokens)
            if token_id is None:
                continue
            first_index = job.sequence.num_outputs
            reason = job.sequence.append(token_id)
            if reason is not None:
                self.drop(job)
            outcomes.append(Outcome(job, first_index, token_id, logprobs, reason))
        return outcomes

    def abort(self, step: DecodeStep) -> None:
        """The step failed and the device is quiet: its writers end."""
        for advance in step.advances:
            self.pool.end_write(advance.written)

    def take_preempted(self) -> list[Outcome]:
        """Jobs that lost their blocks since the last call."""
        preempted, self.preempted = self.preempted, []
        return [Outcome(job, job.sequence.num_outputs, None, None, "resume") for job in preempted]

    def _num_to_launch(self, job: DecodeJob) -> int:
        return job.sequence.num_to_launch if self.num_parts == 1 else job.sequence.num_known_to_launch

    def _make_room(self, job: DecodeJob, num_tokens: int, advances: list[Advance], jobs: Sequence[DecodeJob]) -> bool:
        """Grows the sequence, preempting the newest others of `jobs` that this step does not advance yet, or itself."""
        end = job.sequence.num_launched + num_tokens
        while job.sequence.num_blocks_lacking(end) > self.pool.num_free:
            taken = {advance.job for advance in advances}
            victim = next(other for other in reversed(jobs) if other not in taken and not other.cancelled)
            self.drop(victim)
            self.preempted.append(victim)
            if victim is job:
                return False
        job.sequence.grow(end)
        return True

    def drop(self, job: DecodeJob) -> None:
        """It leaves; a step in flight keeps its blocks until that ends."""
        if job in self.running:
            self.running.remove(job)
        else:
            self.waiting.remove(job)
        job.cancelled = True
        job.sequence.release()

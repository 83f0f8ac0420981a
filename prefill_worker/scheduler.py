"""Which prompt chunks the next step computes, and which blocks it completes. Pure.

Requests are served first come, first served (the global scheduler has ordered them); one step packs chunks of several
requests up to the token budget. All blocks of a prompt are allocated or promised when it starts, so a started prompt
does not stall; it waits where others still hold what fell behind its window, and they are behind it themselves.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.errors import Overloaded, PromptTooLong
from core.kv_layout import KVLayout
from core.messages.to_prefill import Prefill
from core.sampling import TokenLogprobs
from engine.batch import StepBatch, StepResult
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence


@dataclass(eq=False)
class PrefillJob:
    """One attempt on its way through prefill. Times are the caller's clock, in seconds."""

    message: Prefill
    sequence: ActiveSequence
    arrived_at: float
    started_at: float = 0.0
    num_announced: list[int] = field(default_factory=list)  # logical blocks announced or not wanted, by KV group
    cancelled: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """(request id, attempt)."""
        return self.message.request_id, self.message.attempt

    def take_announceable(self, num_computed: int) -> tuple[range, ...]:
        """Logical blocks, by KV group, that become final once `num_computed` tokens are; they are announced once."""
        is_whole = num_computed >= self.sequence.num_prompt
        block_size = self.sequence.block_size
        end = -(-num_computed // block_size) if is_whole else num_computed // block_size
        blocks = tuple(range(first, max(end, first)) for first in self.num_announced)
        self.num_announced = [taken.stop for taken in blocks]
        return blocks


@dataclass(frozen=True)
class Chunk:
    """One job's share of a step; `announce` are the logical blocks that it makes final, by KV group."""

    job: PrefillJob
    num_tokens: int
    written: tuple[int, ...]  # physical
    announce: tuple[range, ...]


@dataclass(frozen=True)
class PrefillStep:
    """A batch and the chunks behind it, in the same order."""

    batch: StepBatch
    chunks: tuple[Chunk, ...]

    @property
    def prompts(self) -> tuple[tuple[str, int], ...]:
        """(request id, attempt) of every chunk."""
        return tuple(chunk.job.key for chunk in self.chunks)


@dataclass(frozen=True)
class Prefilled:
    """A prompt is computed and its first token drawn; `finish_reason` when that ends the request."""

    job: PrefillJob
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass
class PrefillScheduler:
    """Owns waiting and running jobs of one prefill replica."""

    pool: BlockPool
    layout: KVLayout
    max_num_seqs: int
    max_num_batched_tokens: int
    queue_limit: int
    steps_in_flight: int = 1  # at most
    waiting: deque[PrefillJob] = field(default_factory=deque)
    running: list[PrefillJob] = field(default_factory=list)
    newly_started: list[tuple[PrefillJob, tuple[range, ...]]] = field(default_factory=list)

    @property
    def num_at_once(self) -> int:
        """Tokens of one prompt at most that steps in flight compute."""
        return self.steps_in_flight * self.max_num_batched_tokens

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens still to compute, cached ones of waiting requests included."""
        return sum(job.sequence.num_uncomputed for job in (*self.waiting, *self.running))

    def add(self, message: Prefill, now: float) -> PrefillJob:
        """Queues a request. Raises PromptTooLong when it can never fit, Overloaded when the queue is full."""
        sequence = ActiveSequence(self.pool, self.layout, message.sequence)
        num_blocks = self.pool.num_blocks
        if self.layout.num_blocks_held(sequence.num_prompt, self.num_at_once) > num_blocks:
            limit = self.layout.longest_within(num_blocks, self.num_at_once, sequence.num_prompt)
            raise PromptTooLong(f"the prompt has {sequence.num_prompt} tokens, this replica's KV cache holds {limit}")
        if len(self.waiting) >= self.queue_limit:
            raise Overloaded(f"{self.queue_limit} requests wait on this prefill replica", retry_after_s=1.0)
        job = PrefillJob(message, sequence, now, num_announced=[blocks.start for blocks in message.ticket.missing])
        self.waiting.append(job)
        return job

    def cancel(self, request_id: str, attempt: int) -> list[PrefillJob]:
        """Drops this and lower attempts of a request; a step in flight keeps its blocks until it ends."""
        dropped = [job for job in (*self.waiting, *self.running) if self._is_over(job, request_id, attempt)]
        for job in dropped:
            self._drop(job)
            job.cancelled = True
        return dropped

    def take_newly_started(self) -> list[tuple[PrefillJob, tuple[range, ...]]]:
        """Jobs that got their blocks since the last call, and those that they found cached, which are final."""
        started, self.newly_started = self.newly_started, []
        return started

    def schedule(self, now: float) -> PrefillStep | None:
        """The next step, or None when there is nothing to compute."""
        self._start_waiting(now)
        budget = self.max_num_batched_tokens
        chunks = []
        for job in self.running:
            if budget:
                job.sequence.acquire_computed_since()
            num_tokens = min(job.sequence.num_known_to_launch, budget)
            if num_tokens <= 0:
                continue
            try:
                chunks.append(self._chunk(job, num_tokens))
            except OutOfBlocks:
                continue  # until others give back what fell behind its window
            budget -= num_tokens
        if not chunks:
            return None
        launched = (chunk.job.sequence.launch(chunk.num_tokens, number) for number, chunk in enumerate(chunks))
        return PrefillStep(StepBatch(tuple(launched)), tuple(chunks))

    def finish(self, step: PrefillStep, result: StepResult) -> list[Prefilled]:
        """Takes a step's result in; returns the prompts that it completed."""
        done = []
        for chunk, token_id, logprobs in zip(step.chunks, result.token_ids, result.logprobs, strict=True):
            self.pool.end_write(chunk.written)
            job = chunk.job
            if job.cancelled:
                continue
            job.sequence.advance(chunk.num_tokens)
            if token_id is not None:
                done.append(Prefilled(job, token_id, logprobs, job.sequence.append(token_id)))
                self._drop(job)
        return done

    def abort(self, step: PrefillStep) -> None:
        """The step failed and the device is quiet: its writers end."""
        for chunk in step.chunks:
            self.pool.end_write(chunk.written)

    def __iter__(self) -> Iterator[PrefillJob]:
        return iter((*self.running, *self.waiting))

    def _start_waiting(self, now: float) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            job = self.waiting[0]
            try:
                job.sequence.acquire_prefix()
                job.sequence.reserve(self.num_at_once)
            except OutOfBlocks:
                job.sequence.release()
                return
            self.waiting.popleft()
            job.started_at = now
            self.running.append(job)
            self.newly_started.append((job, job.take_announceable(job.sequence.num_computed)))

    def _chunk(self, job: PrefillJob, num_tokens: int) -> Chunk:
        end = job.sequence.num_launched + num_tokens
        job.sequence.grow(end)
        written = tuple(job.sequence.blocks_written_by(num_tokens))
        self.pool.begin_write(written)
        announce = job.take_announceable(end)
        return Chunk(job, num_tokens, written, announce)

    def _drop(self, job: PrefillJob) -> None:
        if job in self.running:
            self.running.remove(job)
        else:
            self.waiting.remove(job)
        job.sequence.release()

    @staticmethod
    def _is_over(job: PrefillJob, request_id: str, attempt: int) -> bool:
        return job.message.request_id == request_id and job.message.attempt <= attempt

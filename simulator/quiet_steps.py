"""Steps of a decode replica whose course is known ahead, so that they are skipped instead of run one by one. Pure.

A job is quiet that advances by its one known token. In a quiet step all jobs are; beside quiet jobs a step may have
others, prompts in the main, which are launched and finished as ever. The state afterwards is that of scheduling and
finishing each step with all its jobs, as long as no quiet job is cancelled before the step ends.
"""

from collections.abc import Mapping, Sequence

from decode_worker.scheduler import DecodeJob, DecodeScheduler, Outcome


class QuietSteps:
    """Of one scheduler, of which no step is in flight, and which runs no pipeline."""

    def __init__(self, scheduler: DecodeScheduler) -> None:
        self._scheduler = scheduler

    def jobs(self) -> list[DecodeJob]:
        """Those that are quiet, in the order in which they run; none when the budget of a step does not cover all."""
        running = self._scheduler.running
        if len(running) > self._scheduler.max_num_batched_tokens:
            return []
        return [
            job
            for job in running
            if len(job.sequence.token_ids) - job.sequence.num_launched == 1 and not job.sequence.num_drawing
        ]

    def count(self, jobs: Sequence[DecodeJob], limit: int) -> int:
        """How many of the next steps, `limit` at most, are quiet for these; in the last some may end, by length.

        0: blocks may run out, or these are none. Nobody may join or leave meanwhile.
        """
        if not jobs:
            return 0
        num_steps = limit
        for job in jobs:
            num_steps = min(num_steps, job.sequence.sampling.max_tokens - job.sequence.num_outputs)
        while num_steps > 0 and not self.have_blocks(jobs, num_steps):
            num_steps //= 2
        return max(0, num_steps)

    def have_blocks(self, jobs: Sequence[DecodeJob], num_steps: int) -> bool:
        """Whether that many steps find blocks, those not counted that fall behind windows meanwhile."""
        num_free = self._scheduler.pool.num_free
        if not jobs or num_steps <= 0:
            return True
        first = jobs[0].sequence
        if len(jobs) * len(first.groups) * (num_steps // first.block_size + 1) <= num_free:
            return True
        lacking = (job.sequence.num_blocks_lacking(job.sequence.num_launched + num_steps) for job in jobs)
        return sum(lacking) <= num_free

    def begin(self, jobs: Sequence[DecodeJob]) -> None:
        """Takes the blocks that the next step begins: what a launch does that others can see while it computes."""
        for job in jobs:
            sequence = job.sequence
            if sequence.num_launched % sequence.block_size == 0:
                sequence.grow(sequence.num_launched + 1)

    def skip(
        self, jobs: Sequence[DecodeJob], num_steps: int, outputs: Mapping[DecodeJob, Sequence[int]]
    ) -> list[Outcome]:
        """As many steps as `count` allows, at once. `outputs`: all that the model says, from a job's first token on.

        Returns the outcomes of jobs that ended in the last step; they have left the batch.
        """
        changing: list[tuple[DecodeJob, int, Outcome | None]] = []  # with where it stands, and how it ends
        changes: list[tuple[int, bool, int]] = []  # by number in `changing`; sorted, the order in which steps make them
        for job in jobs:
            sequence, sampling = job.sequence, job.sequence.sampling
            num_before, start = sequence.num_outputs, sequence.num_computed
            num_outputs = num_before + num_steps
            sequence.token_ids += outputs[job][num_before:num_outputs]
            last, outcome = sequence.token_ids[-1], None
            found = sequence.changes(num_steps)
            if num_outputs >= sampling.max_tokens or last in sampling.stop_token_ids:
                reason = "stop" if last in sampling.stop_token_ids else "length"
                outcome = Outcome(job, num_outputs - 1, last, None, reason)
                found.add((num_steps, True))
            if not found:
                sequence.num_computed = sequence.num_launched = start + num_steps
                continue
            changes += [(step, at_end, len(changing)) for step, at_end in found]
            changing.append((job, start, outcome))
        for step, at_end, number in sorted(changes):
            job, start, outcome = changing[number]
            if not at_end:
                job.sequence.grow(start + step)
                continue
            job.sequence.pass_over(start + step)
            if step == num_steps and outcome is not None:
                self._scheduler.drop(job)
        for job, start, _ in changing:
            job.sequence.num_computed = job.sequence.num_launched = start + num_steps
        return [outcome for _, _, outcome in changing if outcome is not None]

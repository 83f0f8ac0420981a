"""Skipping quiet steps, and quiet jobs beside prompts, leaves exactly what scheduling and finishing all of them leaves,
block for block.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from core.block_hash import chain_seed, hash_blocks
from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from core.messages.to_decode import Sequence
from core.sampling import SamplingParams
from decode_worker.scheduler import DecodeJob, DecodeScheduler
from engine.batch import StepResult
from engine.block_pool import BlockPool, OutOfBlocks
from engine.sequence import ActiveSequence
from simulator.quiet_steps import QuietSteps

BLOCK = 3
PLAIN = KVLayout(2, 1, 1, BLOCK, "float32", 1)
WINDOWED = KVLayout(3, 1, 1, BLOCK, "float32", 1, groups=(KVGroup((1,)), KVGroup((0,), 4), KVGroup((2,), 7)))


def token(request_id: str, index: int) -> int:
    """What is said at an output position; few words, so that continuations of equal prompts are often shared."""
    return (len(request_id) + index // 5) % 2


class Batch:
    """A decode replica's pool and scheduler, driven step by step or by skips."""

    def __init__(self, layout: KVLayout, num_blocks: int, skips: bool) -> None:
        self.layout = layout
        self.pool = BlockPool(num_blocks)
        self.scheduler = DecodeScheduler(self.pool, max_num_seqs=4, max_num_batched_tokens=8)
        self.quiet = QuietSteps(self.scheduler)
        self.skips = skips
        self.outcomes: list[tuple] = []
        self.num_skipped = 0
        self.num_beside = 0  # tokens of quiet jobs beside prompts

    def add(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """As a local prefill joins."""
        tokens = tuple(prompt)
        message = Sequence(tokens, hash_blocks(tokens, BLOCK), SamplingParams(max_tokens), chain_seed())
        sequence = ActiveSequence(self.pool, self.layout, message)
        try:
            sequence.acquire_prefix()
            sequence.reserve(8)
        except OutOfBlocks:
            sequence.release()
            return
        self.scheduler.add(DecodeJob(request_id, 0, sequence))

    def run(self, num_steps: int) -> None:
        left = num_steps
        while left:
            self.scheduler.admit()
            jobs = self.quiet.jobs() if self.skips else []
            all_quiet = len(jobs) == len(self.scheduler.running)
            num_quiet = self.quiet.count(jobs, left if all_quiet else 1)
            if num_quiet and all_quiet:
                self.quiet.begin(jobs)
                self.skip(jobs, num_quiet)
                self.num_skipped += num_quiet
            else:
                self.step(jobs if num_quiet else [])
            left -= num_quiet if num_quiet and all_quiet else 1

    def skip(self, jobs: list[DecodeJob], num_steps: int) -> None:
        outputs = {
            job: [token(job.request_id, index) for index in range(job.sequence.sampling.max_tokens)] for job in jobs
        }
        self.outcomes += [self.seen(outcome) for outcome in self.quiet.skip(jobs, num_steps, outputs)]

    def step(self, quiet: list[DecodeJob]) -> None:
        """`quiet` are skipped over it."""
        self.scheduler.admit()
        self.quiet.begin(quiet)
        step = self.scheduler.launch([job for job in self.scheduler.running if job not in quiet])
        self.outcomes += [self.seen(outcome) for outcome in self.scheduler.take_preempted()]
        self.skip(quiet, 1)
        self.num_beside += len(quiet)
        if step is None:
            return
        drawn = tuple(
            token(a.job.request_id, a.job.sequence.num_outputs) if s.draw is not None else None
            for s, a in zip(step.batch.sequences, step.advances, strict=True)
        )
        ended = self.scheduler.finish(step, StepResult(drawn, (None,) * len(drawn)))
        self.outcomes += [self.seen(outcome) for outcome in ended if outcome.finish_reason]

    @staticmethod
    def seen(outcome) -> tuple:
        return outcome.job.request_id, outcome.first_index, outcome.token_id, outcome.finish_reason

    def state(self) -> object:
        """All that anybody could tell two replicas apart by."""
        pool = self.pool
        jobs = [
            (
                job.request_id,
                list(job.sequence.token_ids),
                [(blocks.first, list(blocks.blocks)) for blocks in job.sequence.groups],
                job.sequence.num_computed,
                job.sequence.num_launched,
                job.sequence.num_promised,
            )
            for job in (*self.scheduler.running, *self.scheduler.waiting)
        ]
        order = list(pool._free), list(pool._released_at), dict(pool._cached), dict(pool._children)
        return jobs, pool.num_free, pool.num_promised, order, self.outcomes


events = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 25), st.integers(1, 3)
        ),
        st.tuples(st.just("run"), st.integers(1, 30)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(layout=st.sampled_from([PLAIN, WINDOWED]), num_blocks=st.integers(6, 30), events=events)
def test_skipping_equals_stepping(layout, num_blocks, events):
    stepping, skipping = Batch(layout, num_blocks, skips=False), Batch(layout, num_blocks, skips=True)
    names: list[str] = []
    for kind, *details in events:
        if kind == "add":
            prompt, max_tokens, length = details
            names.append("x" * length + str(len(names)))
        for batch in (stepping, skipping):
            if kind == "add":
                batch.add(names[-1], prompt, max_tokens)
            elif kind == "run":
                batch.run(details[0])
            elif names:
                batch.scheduler.cancel(names[details[0] % len(names)], 0)
        assert skipping.state() == stepping.state()
        skipping.pool.validate()
        told, expected = skipping.pool.drain_events(), stepping.pool.drain_events()
        assert [set(keys) for keys in told] == [set(keys) for keys in expected]


def test_a_long_answer_is_skipped_almost_whole():
    batch = Batch(PLAIN, 30, skips=True)
    batch.add("a", [1, 0, 1], 60)
    batch.run(60)
    assert batch.num_skipped == 59  # all but the prompt's own step
    assert batch.outcomes == [("a", 59, token("a", 59), "length")]
    assert batch.pool.num_held == 0


def test_who_decodes_beside_a_prompt_is_skipped_over_its_chunks():
    batch = Batch(PLAIN, 30, skips=True)
    batch.add("a", [1, 0, 1], 60)
    batch.run(3)
    batch.add("b", [0] * 30, 4)
    batch.run(5)  # its chunks of seven tokens, and its second token
    assert [len(job.sequence.token_ids) for job in batch.scheduler.running] == [3 + 8, 30 + 1]
    assert batch.num_beside == 5


def test_what_ends_first_bounds_the_skip():
    batch = Batch(PLAIN, 30, skips=True)
    batch.add("a", [1], 10)
    batch.add("b", [0], 4)
    batch.step([])
    assert batch.quiet.count(batch.quiet.jobs(), 100) == 3

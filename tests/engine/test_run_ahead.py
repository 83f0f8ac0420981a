"""A step may be launched while the one before it is in flight, and go on with the tokens that this one draws."""

import random
from contextlib import contextmanager

import pytest

from core.block_hash import chain_seed, hash_blocks
from core.kv_layout import KVLayout
from core.messages.to_decode import Sequence as Prompt
from core.sampling import SamplingParams
from decode_worker.scheduler import DecodeJob, DecodeScheduler
from engine.batch import DRAWN, BlockTable, Draw, SequenceStep, StepBatch, StepResult
from engine.block_pool import BlockPool
from engine.sequence import ActiveSequence
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import PlainEngine, greedy, make_runner
from tests.engine.rank_threads import rank_threads

LAYOUT = KVLayout(1, 1, 8, 4, "float32", 1)
STOP = 7


def sequence_of(pool: BlockPool, prompt: list[int], max_tokens: int) -> ActiveSequence:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=frozenset({STOP}))
    return ActiveSequence(pool, LAYOUT, Prompt(tuple(prompt), hash_blocks(prompt, 4), sampling, chain_seed()))


def test_a_sequence_is_launched_ahead_of_what_is_known_by_one_token():
    sequence = sequence_of(BlockPool(4), [1, 2, 3], max_tokens=3)
    sequence.grow(5)
    first = sequence.launch(3, number=5)
    assert (first.token_ids, first.drawn_by, first.draw is not None) == ((1, 2, 3), None, True)
    second = sequence.launch(1, number=2)
    assert (second.token_ids, second.first_position, second.drawn_by) == ((DRAWN,), 3, 5)
    sequence.advance(3)
    assert sequence.append(11) is None
    third = sequence.launch(1, number=0)
    assert (third.token_ids, third.first_position, third.drawn_by) == ((DRAWN,), 4, 2)
    assert sequence.num_to_launch == 0, "the third token may not be followed by a fourth"
    for token, reason in ((12, None), (13, "length")):
        sequence.advance(1)
        assert sequence.append(token) == reason
    assert sequence.token_ids == [1, 2, 3, 11, 12, 13]


def token_after(tokens: list[int]) -> int:
    return (31 * sum(tokens) + len(tokens)) % 50 + 1


class PretendedEngine:
    """Knows all tokens of each sequence by its first block, and draws the next from them."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, int]] = {}  # by first block: tokens by position
        self.last: list[int | None] = []

    def execute(self, batch: StepBatch) -> StepResult:
        drawn: list[int | None] = []
        for step in batch.sequences:
            tokens = self.seen.setdefault(step.block_tables[0].blocks[0], {})
            for position, token in enumerate(step.token_ids, step.first_position):
                if token == DRAWN:
                    assert step.drawn_by is not None
                    token = self.last[step.drawn_by]
                    assert token is not None
                tokens[position] = token
            end = step.first_position + len(step.token_ids)
            drawn.append(None if step.draw is None else token_after([tokens[i] for i in range(end)]))
        self.last = drawn
        return StepResult(tuple(drawn), (None,) * len(drawn))


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("seed", range(30))
def test_what_is_decoded_does_not_depend_on_how_many_steps_are_in_flight(seed: int, num_parts: int):
    """Stop tokens, limits, cancelled and preempted sequences, prompts prefilled here; nothing is held at the end.

    Of several parts, which follow each other through stages, none needs a token that is still being drawn.
    """
    rng = random.Random(seed)
    pool, engine = BlockPool(24), PretendedEngine()
    scheduler = DecodeScheduler(pool, max_num_seqs=4, max_num_batched_tokens=9, num_parts=num_parts)
    most_in_flight = max(2, num_parts)
    prompts = {f"r{i}": [rng.randrange(1, 50) for _ in range(rng.randrange(1, 12))] for i in range(12)}
    limits = {name: rng.randrange(1, 20) for name in prompts}
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    over: dict[str, str] = {}
    for name, prompt in prompts.items():
        scheduler.add(DecodeJob(name, 0, sequence_of(pool, prompt, limits[name])))
    in_flight: list = []

    def deliver(outcomes) -> None:
        for outcome in outcomes:
            assert outcome.job.request_id not in over
            if outcome.token_id is not None:
                outputs[outcome.job.request_id].append(outcome.token_id)
            if outcome.finish_reason is not None:
                over[outcome.job.request_id] = outcome.finish_reason

    while in_flight or scheduler.running or scheduler.waiting:
        step = scheduler.schedule() if len(in_flight) < most_in_flight else None
        deliver(scheduler.take_preempted())
        if step is not None:
            assert num_parts == 1 or all(DRAWN not in sequence.token_ids for sequence in step.batch.sequences)
            in_flight.append((step, engine.execute(step.batch)))
        if step is None or len(in_flight) == most_in_flight:
            deliver(scheduler.finish(*in_flight.pop(0)))
        if rng.random() < 0.02:
            victim = rng.choice([name for name in prompts if name not in over] or ["none"])
            scheduler.cancel(victim, 0)
            over.setdefault(victim, "cancelled")
        pool.validate()
    assert pool.num_held == pool.num_promised == 0
    for name, prompt in prompts.items():
        expected: list[int] = []
        while len(expected) < limits[name] and STOP not in expected:
            expected.append(token_after(prompt + expected))
        assert outputs[name] == expected[: len(outputs[name])]
        if over[name] in ("stop", "length"):
            assert outputs[name] == expected


@contextmanager
def runner_of(path, num_ranks: int):
    if num_ranks == 1:
        runner = make_runner(path)
        yield runner
        runner.close()
    else:
        with rank_threads(path, num_ranks) as runner:
            yield runner


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_goes_on_with_what_the_step_in_flight_draws(tmp_path, num_ranks: int):
    path = make_checkpoint(tmp_path, "llama")
    prompts, tables = [[5, 6, 7], [9] * 20], [(BlockTable((0,)),), (BlockTable((1, 2)),)]
    draws = [Draw(0.0, 1.0, 0, 0), Draw(0.8, 0.9, 20, 4)]
    limits = [greedy(3), SamplingParams(3, temperature=0.8, top_p=0.9, top_k=20, seed=4)]
    with runner_of(path, num_ranks) as runner:
        expected = [one.output for one in PlainEngine(runner).generate(prompts, limits)]
        launched = [runner.launch(StepBatch(tuple(map(SequenceStep, map(tuple, prompts), (0, 0), tables, draws))))]
        for turn in range(2):  # the order of the batch changes from step to step
            order = (1, 0) if turn == 0 else (0, 1)
            steps = [
                SequenceStep((DRAWN,), len(prompts[i]) + turn, tables[i], draws[i], 1 - i if turn else i) for i in order
            ]
            launched.append(runner.launch(StepBatch(tuple(steps))))
        first, second, third = (runner.collect(step).token_ids for step in launched)
    assert [list(tokens) for tokens in zip(first, second[::-1], third, strict=True)] == expected

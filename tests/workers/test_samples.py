"""What replicas measure of their steps, and who is told which of it."""

from engine.batch import BlockTable, SequenceStep, StepBatch
from worker.samples import KEPT, Recent, Samples, step_sample

TABLES = (BlockTable((0,)),)


def part(count: int, before: int) -> SequenceStep:
    return SequenceStep(tuple(range(count)), before, TABLES, None)


def test_a_step_is_told_by_its_prompt_tokens_their_pairs_and_its_batch():
    """Three tokens behind ten see 11 + 12 + 13 of them; two sequences decode behind 5 and 7 others."""
    batch = StepBatch((part(3, 10), part(1, 5), part(1, 7), part(2, 0)))
    assert step_sample(batch, 0.5) == (5, 11 + 12 + 13 + 1 + 2, 2, 6 + 8, 0.5)


def test_every_reader_gets_the_latest_samples_once():
    recent: Recent[int] = Recent()
    for sample in range(3):
        recent.add(sample)
    assert recent.since(0) == (0, 1, 2)
    assert recent.since(2) == (2,)
    assert recent.since(recent.num_seen) == ()
    for sample in range(100, 100 + 2 * KEPT):
        recent.add(sample)
    assert recent.since(3) == tuple(range(100 + KEPT, 100 + 2 * KEPT)), "of more than are kept, the latest"


def test_transfers_of_nothing_are_no_samples():
    samples = Samples()
    samples.add_transfer("p0", 0, 0.1)
    samples.add_transfer("p0", 10, 0.0)
    samples.add_transfer("p0", 10, 0.1)
    assert samples.transfers.since(0) == (("p0", 10, 0.1),)

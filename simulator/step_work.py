"""What a step computes whose quiet jobs are skipped beside those that it launched. Pure."""

from core.messages.to_scheduler import StepSample
from decode_worker.scheduler import DecodeJob, DecodeStep
from simulator.cost.cost_model import StepWork
from worker.samples import step_sample


def work_of(step: DecodeStep, quiet: list[DecodeJob]) -> StepWork:
    """For the costs, while the step has not ended."""
    chunks, num_decoding = [], len(quiet)
    num_kv_tokens = sum(job.sequence.num_launched for job in quiet)
    for advance, share in zip(step.advances, step.batch.sequences, strict=True):
        if advance.num_tokens > 1:
            chunks.append((advance.num_tokens, share.first_position))
        else:
            num_decoding += 1
            num_kv_tokens += share.first_position
    return StepWork(tuple(chunks), num_decoding, num_kv_tokens)


def step_sample_of(step: DecodeStep, quiet: list[DecodeJob], seconds: float) -> StepSample:
    """For reports, before the step's end is taken in."""
    num_tokens, num_pairs, num_decoding, num_kv_tokens, _ = step_sample(step.batch, seconds)
    num_kv_tokens += sum(job.sequence.num_launched + 1 for job in quiet)
    return num_tokens, num_pairs, num_decoding + len(quiet), num_kv_tokens, seconds

"""What a replica measured lately: raw times of steps and transfers, for whoever fits costs to them. Pure."""

from collections import deque
from itertools import islice
from typing import Generic, TypeVar

from core.messages.to_scheduler import StepSample, TransferSample
from engine.batch import StepBatch

KEPT = 8  # samples between two reports; of more the latest are told

Sample = TypeVar("Sample")


class Recent(Generic[Sample]):
    """The latest samples, numbered from 1, so that each reader gets those that it has not seen."""

    def __init__(self) -> None:
        self.num_seen = 0
        self._samples: deque[Sample] = deque(maxlen=KEPT)

    def add(self, sample: Sample) -> None:
        """One more."""
        self.num_seen += 1
        self._samples.append(sample)

    def since(self, number: int) -> tuple[Sample, ...]:
        """Those after the first `number`, as far as they are kept."""
        num_new = min(self.num_seen - number, len(self._samples))
        return tuple(islice(self._samples, len(self._samples) - num_new, None))


class Samples:
    """One per replica."""

    def __init__(self) -> None:
        self.steps: Recent[StepSample] = Recent()
        self.transfers: Recent[TransferSample] = Recent()

    def add_step(self, batch: StepBatch, seconds: float) -> None:
        """A step was computed."""
        self.steps.add(step_sample(batch, seconds))

    def add_transfer(self, source_id: str, num_bytes: int, seconds: float) -> None:
        """KV has come in."""
        if num_bytes and seconds > 0:
            self.transfers.add((source_id, num_bytes, seconds))


def step_sample(batch: StepBatch, seconds: float) -> StepSample:
    """Sequences that advance by one token count as decoding, the others as parts of prompts."""
    num_tokens = num_pairs = num_decoding = num_kv_tokens = 0
    for sequence in batch.sequences:
        count, before = len(sequence.token_ids), sequence.first_position
        if count == 1:
            num_decoding += 1
            num_kv_tokens += before + 1
        else:
            num_tokens += count
            num_pairs += count * before + count * (count + 1) // 2
    return num_tokens, num_pairs, num_decoding, num_kv_tokens, seconds

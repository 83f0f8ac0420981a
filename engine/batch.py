"""What one engine step computes, and what comes out of it. Pure: no tensors.

launch(StepBatch) -> in flight -> collect() -> StepResult
"""

from dataclasses import dataclass

from core.sampling import TokenLogprobs


@dataclass(frozen=True)
class Draw:
    """How to sample the token that follows a sequence's last computed one; see core.sampling.SamplingParams."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    num_logprobs: int | None = None


@dataclass(frozen=True)
class BlockTable:
    """Where a sequence's blocks of one KV group lie: those from logical block `first` on, the others are given back."""

    blocks: tuple[int, ...]  # physical ids; they cover every position from the first that is seen to the last computed
    first: int = 0

    def physical(self, block: int) -> int:
        """Of a logical block."""
        return self.blocks[block - self.first]

    def between(self, blocks: range) -> tuple[int, ...]:
        """Of consecutive logical blocks."""
        return self.blocks[blocks.start - self.first : blocks.stop - self.first]


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's share of a step: compute KV of `token_ids` at positions first_position, first_position + 1, ...

        cached KV                computed now
    [ 0 ....... first_position | token_ids ] -> draw the token at position first_position + len(token_ids)

    `draw` None: the middle of a prompt, nothing is sampled.
    """

    token_ids: tuple[int, ...]  # at least one
    first_position: int
    block_tables: tuple[BlockTable, ...]  # by KV group
    draw: Draw | None


@dataclass(frozen=True)
class StepBatch:
    """All sequences of one step, prompt chunks and single decode tokens mixed."""

    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True)
class StepResult:
    """The drawn tokens, one entry per sequence of the batch; None where nothing was drawn."""

    token_ids: tuple[int | None, ...]
    logprobs: tuple[TokenLogprobs | None, ...]

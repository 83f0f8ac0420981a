"""Pools whose KV is the token prefix itself, so that a block reused too early shows."""

from engine.batch import StepResult

BLOCK, LAYERS = 2, 2


class Memory:
    """KV by (layer, block, slot): the token prefix up to that position."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def write_step(self, sequence_step) -> None:
        for offset in range(len(sequence_step.token_ids)):
            position = sequence_step.first_position + offset
            block = sequence_step.block_table[position // BLOCK]
            prefix = sequence_step.prefix[: position + 1]
            for layer in range(LAYERS):
                self.cells[layer, block, position % BLOCK] = prefix

    def check(self, sequence_step) -> None:
        """What this step attends to is its own prefix, position by position."""
        for position in range(sequence_step.first_position):
            block = sequence_step.block_table[position // BLOCK]
            for layer in range(LAYERS):
                found = self.cells.get((layer, block, position % BLOCK))
                assert found == sequence_step.prefix[: position + 1], f"position {position}: {found}"


class Prefixed:
    """A sequence step together with the tokens before it, which the real engine would find in its KV."""

    def __init__(self, step, tokens) -> None:
        self.token_ids, self.first_position, self.block_table = step.token_ids, step.first_position, step.block_table
        self.draw = step.draw
        self.prefix = tuple(tokens[: step.first_position + len(step.token_ids)])


def next_token(prefix: tuple[int, ...]) -> int:
    return sum(prefix) % 2


def draw(sequences: list[Prefixed]) -> StepResult:
    """The step's tokens, each a function of all tokens before it."""
    tokens = tuple(next_token(s.prefix) if s.draw is not None else None for s in sequences)
    return StepResult(tokens, (None,) * len(tokens))

"""Pools whose KV is the token prefix itself, so that a block reused too early shows."""

from core.kv_groups import KVGroup
from core.kv_layout import KVLayout
from engine.batch import StepResult

BLOCK, LAYERS, WINDOW = 2, 2, 3
PLAIN = KVLayout(LAYERS, 1, 1, BLOCK, "float32", 1)
WINDOWED = KVLayout(
    4, 1, 1, BLOCK, "float32", 1, groups=(KVGroup((1, 3)), KVGroup((0,), WINDOW), KVGroup((2,), WINDOW + 1))
)


class Memory:
    """KV by (place, block, slot): the KV group, and the token prefix up to that position."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.cells: dict[tuple[int, int, int], tuple[int, tuple[int, ...]]] = {}

    def write_step(self, sequence_step) -> None:
        for offset in range(len(sequence_step.token_ids)):
            position = sequence_step.first_position + offset
            prefix = sequence_step.prefix[: position + 1]
            for number, group in enumerate(self.layout.kv_groups):
                block = sequence_step.block_tables[number].physical(position // BLOCK)
                for place in range(len(group.layers)):
                    self.cells[place, block, position % BLOCK] = number, prefix

    def check(self, sequence_step) -> None:
        """What this step attends to is its own prefix, position by position."""
        for number, group in enumerate(self.layout.kv_groups):
            first = 0 if group.window is None else max(0, sequence_step.first_position - group.window + 1)
            for position in range(first, sequence_step.first_position):
                block = sequence_step.block_tables[number].physical(position // BLOCK)
                for place in range(len(group.layers)):
                    found = self.cells.get((place, block, position % BLOCK))
                    wanted = number, sequence_step.prefix[: position + 1]
                    assert found == wanted, f"group {number}, position {position}: {found}"


class Prefixed:
    """A sequence step together with the tokens before it, which the real engine would find in its KV."""

    def __init__(self, step, tokens) -> None:
        self.token_ids, self.first_position, self.block_tables = step.token_ids, step.first_position, step.block_tables
        self.draw = step.draw
        self.prefix = tuple(tokens[: step.first_position + len(step.token_ids)])


def next_token(prefix: tuple[int, ...]) -> int:
    return sum(prefix) % 2


def draw(sequences: list[Prefixed]) -> StepResult:
    """The step's tokens, each a function of all tokens before it."""
    tokens = tuple(next_token(s.prefix) if s.draw is not None else None for s in sequences)
    return StepResult(tokens, (None,) * len(tokens))

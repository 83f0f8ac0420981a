"""What the sequences of a step see of the paged KV cache, as rows to gather, and where their own tokens go.

A layer finds its KV in the blocks of its KV group, at its place there (see core/kv_groups).

Shapes: T rows (tokens of the step), P planes, H KV heads, D head size, S tokens per block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.kv_groups import KVGroup, places_of
from engine.batch import SequenceStep
from engine.step_inputs import StepInputs, int_tensor

GATHER_BYTES = 4 << 20  # of KV copied together for single-token sequences: stays in a CPU's cache


@dataclass(frozen=True)
class SingleGroup:
    """Single-token sequences of similar length: rows [first, first + count), padded to one number of blocks."""

    first: int
    count: int
    gather_rows: Tensor  # [P * count * H * blocks]
    hidden: Tensor  # [count, 1, 1, blocks * S]: what the sequence does not see

    @property
    def rows(self) -> slice:
        """Of the step."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class Chunk:
    """Several tokens of one sequence: rows [first, first + count), the last of `context` gathered positions."""

    first: int
    count: int
    context: int
    gather_rows: Tensor | None  # [P * H * blocks]; None: nothing is cached, the rows' own KV is the context

    @property
    def rows(self) -> slice:
        """Of the step."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class View:
    """What all layers of one KV group see of a step's sequences."""

    groups: list[SingleGroup]
    chunks: list[Chunk]

    def attend(self, singles: Callable[[SingleGroup], Tensor], chunk: Callable[[Chunk], Tensor]) -> Tensor:
        """What the two give for their rows, in the order of the step."""
        parts = [singles(group) for group in self.groups] + [chunk(one) for one in self.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class PagedCache:
    """A rank's KV cache as rows. Runs on CPU and CUDA."""

    def __init__(self, cache: Tensor, groups: Sequence[KVGroup]) -> None:
        """`cache`: [places, blocks, P, H, S, D]."""
        places, blocks, self.num_planes, self.num_heads, self.block_size, self.head_dim = cache.shape
        self.device = cache.device
        self.block_bytes = cache[0, 0].nbytes  # of one layer
        self.groups = groups
        self.place_of = places_of(groups)
        rows = blocks * self.num_planes * self.num_heads
        self.head_blocks = cache.view(places, rows, self.block_size * self.head_dim)
        self.slots = cache.view(places, rows * self.block_size, self.head_dim)

    def view(self, inputs: StepInputs, number: int) -> View:
        """For the group of that number. Blocks behind the window of every row of a sequence are never touched."""
        groups = [self._single_group(group, first, number) for first, group in self._similar(inputs, number)]
        chunks, first = [], inputs.num_single
        for sequence in inputs.sequences[inputs.num_single :]:
            chunks.append(self._chunk(sequence, first, number))
            first += len(sequence.token_ids)
        return View(groups, chunks)

    def slot_rows(self, inputs: StepInputs, number: int) -> Tensor:
        """Rows of `slots` [P, T * H] that take the step's tokens in the group of that number."""
        blocks = [
            sequence.block_tables[number].physical(position // self.block_size)
            for sequence in inputs.sequences
            for position in range(sequence.first_position, sequence.first_position + len(sequence.token_ids))
        ]
        plane = torch.arange(self.num_planes, device=self.device).view(-1, 1, 1)
        head = torch.arange(self.num_heads, device=self.device)
        rows = (int_tensor(blocks, self.device)[None, :, None] * self.num_planes + plane) * self.num_heads + head
        return (rows * self.block_size + (inputs.positions % self.block_size)[None, :, None]).flatten(1)

    def _similar(self, inputs: StepInputs, number: int) -> list[tuple[int, list[SequenceStep]]]:
        """Splits the single-token sequences (sorted by length) where padding would double the work or memory."""
        limit = max(1, GATHER_BYTES // self.block_bytes)
        groups: list[tuple[int, list[SequenceStep]]] = []
        for row, sequence in enumerate(inputs.sequences[: inputs.num_single]):
            blocks = len(self._blocks(sequence, number))
            group = groups[-1][1] if groups else []
            if group and blocks <= 2 * len(self._blocks(group[0], number)) + 2 and blocks * (len(group) + 1) <= limit:
                group.append(sequence)
            else:
                groups.append((row, [sequence]))
        return groups

    def _blocks(self, sequence: SequenceStep, number: int) -> range:
        """The sequence's logical blocks that hold what its rows see."""
        end = sequence.first_position + len(sequence.token_ids)
        first = self.groups[number].first_needed(sequence.first_position, self.block_size)
        return range(first, -(-end // self.block_size))

    def _gather_rows(self, block_tables: Tensor) -> Tensor:
        """Rows of `head_blocks` in the order [P, sequences, H, blocks] for tables [sequences, blocks]."""
        plane = torch.arange(self.num_planes, device=self.device).view(-1, 1, 1, 1)
        head = torch.arange(self.num_heads, device=self.device).view(1, 1, -1, 1)
        return ((block_tables[None, :, None, :] * self.num_planes + plane) * self.num_heads + head).flatten()

    def _single_group(self, group: list[SequenceStep], first: int, number: int) -> SingleGroup:
        window = self.groups[number].window
        seen = [self._blocks(sequence, number) for sequence in group]
        num_blocks = max(map(len, seen))
        tables = [
            _padded(s.block_tables[number].between(blocks), num_blocks) for s, blocks in zip(group, seen, strict=True)
        ]
        offsets = [blocks.start * self.block_size for blocks in seen]
        ends = [sequence.first_position + 1 - offset for sequence, offset in zip(group, offsets, strict=True)]
        bounds = int_tensor((ends, [0 if window is None else end - window for end in ends]), self.device)[..., None]
        positions = torch.arange(num_blocks * self.block_size, device=self.device)
        hidden = (positions >= bounds[0]) | (positions < bounds[1])
        gather_rows = self._gather_rows(int_tensor(tables, self.device))
        return SingleGroup(first, len(group), gather_rows, hidden[:, None, None])

    def _chunk(self, sequence: SequenceStep, first: int, number: int) -> Chunk:
        count = len(sequence.token_ids)
        if sequence.first_position == 0:
            return Chunk(first, count, count, None)
        blocks = self._blocks(sequence, number)
        context = sequence.first_position + count - blocks.start * self.block_size
        table = int_tensor([sequence.block_tables[number].between(blocks)], self.device)
        return Chunk(first, count, context, self._gather_rows(table))


class StepContext:
    """The cache as one step uses it; what depends on a KV group is made when one of its layers comes."""

    def __init__(self, cache: PagedCache, inputs: StepInputs) -> None:
        self._cache = cache
        self._inputs = inputs
        self._slot_rows: dict[int, Tensor] = {}  # by number of the group
        self._views: dict[int, View] = {}
        self.dtype = cache.slots.dtype

    def write(self, layer: int, *planes: Tensor) -> None:
        """The step's tokens, [T, H, D] of each plane."""
        number, place = self._cache.place_of[layer]
        if number not in self._slot_rows:
            self._slot_rows[number] = self._cache.slot_rows(self._inputs, number)
        for rows, plane in zip(self._slot_rows[number], planes, strict=True):
            self._cache.slots[place].index_copy_(0, rows, plane.reshape(-1, self._cache.head_dim))

    def view(self, layer: int) -> View:
        """The same for every layer of a group."""
        number, _ = self._cache.place_of[layer]
        if number not in self._views:
            self._views[number] = self._cache.view(self._inputs, number)
        return self._views[number]

    def of_singles(self, layer: int, group: SingleGroup) -> Tensor:
        """The context of each sequence, [P, count, H, blocks * S, D]."""
        cache = self._cache
        gathered = self._gather(layer, group.gather_rows)
        return gathered.view(cache.num_planes, group.count, cache.num_heads, -1, cache.head_dim)

    def of_chunk(self, layer: int, chunk: Chunk, *planes: Tensor) -> list[Tensor]:
        """The context of its last row, [H, context, D] per plane; `planes`: what the step wrote, [T, H, D] each."""
        if chunk.gather_rows is None:
            return [plane[chunk.rows].transpose(0, 1) for plane in planes]
        cache = self._cache
        gathered = self._gather(layer, chunk.gather_rows)
        return list(gathered.view(cache.num_planes, cache.num_heads, -1, cache.head_dim)[:, :, : chunk.context])

    def _gather(self, layer: int, rows: Tensor) -> Tensor:
        _, place = self._cache.place_of[layer]
        return self._cache.head_blocks[place].index_select(0, rows)


def _padded(blocks: tuple[int, ...], num_blocks: int) -> list[int]:
    return list(blocks + blocks[:1] * (num_blocks - len(blocks)))

"""Attention over the paged KV cache: the interface, and its implementation in plain torch.

Shapes: T rows (tokens of the step), Q query heads, H KV heads, G = Q / H, D head size, S tokens per block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.attention_math import AttentionRule, attend_causal, attend_single
from engine.batch import SequenceStep
from engine.step_inputs import StepInputs, int_tensor

GATHER_BYTES = 4 << 20  # of KV copied together for single-token sequences: stays in a CPU's cache


class AttentionStep(Protocol):
    """Attention in all layers of one step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Writes key and value [T, H, D] to the cache, then query [T, Q, D] attends to what the rule lets it see of its
        context: [T, Q * D].
        """
        ...


class AttentionBackend(Protocol):
    """Knows the cache, and prepares once per step what all layers share."""

    def plan(self, inputs: StepInputs) -> AttentionStep:
        """Never waits for the device."""
        ...


@dataclass(frozen=True)
class _SingleGroup:
    """Single-token sequences of similar length: rows [first, first + count), padded to one number of blocks."""

    first: int
    count: int
    num_blocks: int
    gather_rows: Tensor  # [2 * count * H * num_blocks]
    hidden: Tensor  # [count, 1, 1, num_blocks * S]: what the sequence does not see


@dataclass(frozen=True)
class _Chunk:
    """Several tokens of one sequence: rows [first, first + count), the last of `context` gathered positions."""

    first: int
    count: int
    context: int
    gather_rows: Tensor | None  # [2 * H * blocks]; None: nothing is cached, the rows' own KV is the context


@dataclass(frozen=True)
class _View:
    """What all layers of one window see of a step's sequences."""

    groups: list[_SingleGroup]
    chunks: list[_Chunk]


class TorchAttention:
    """Gathers blocks into contiguous keys and values, then plain products. Runs on CPU and CUDA."""

    def __init__(self, cache: Tensor, num_query_heads: int) -> None:
        """`cache`: [layers, blocks, 2, H, S, D]."""
        layers, blocks, _, self.num_heads, self.block_size, self.head_dim = cache.shape
        self.num_query_heads = num_query_heads
        self.device, self.dtype = cache.device, cache.dtype
        self.head_blocks = cache.view(layers, blocks * 2 * self.num_heads, self.block_size * self.head_dim)
        self.slots = cache.view(layers, blocks * 2 * self.num_heads * self.block_size, self.head_dim)

    def plan(self, inputs: StepInputs) -> "TorchAttentionStep":
        """Index tensors of one step; what depends on a window is made when a layer with it comes."""
        return TorchAttentionStep(self, inputs, self._slot_rows(inputs))

    def view(self, inputs: StepInputs, window: int | None) -> _View:
        """Blocks behind the window of every row of a sequence are never touched."""
        groups = [self._single_group(group, first, window) for first, group in self._similar(inputs, window)]
        chunks, first = [], inputs.num_single
        for sequence in inputs.sequences[inputs.num_single :]:
            chunks.append(self._chunk(sequence, first, window))
            first += len(sequence.token_ids)
        return _View(groups, chunks)

    def _similar(self, inputs: StepInputs, window: int | None) -> list[tuple[int, list[SequenceStep]]]:
        """Splits the single-token sequences (sorted by length) where padding would double the work or memory."""
        bytes_per_block = 2 * self.num_heads * self.block_size * self.head_dim * self.dtype.itemsize
        limit = max(1, GATHER_BYTES // bytes_per_block)
        groups: list[tuple[int, list[SequenceStep]]] = []
        for row, sequence in enumerate(inputs.sequences[: inputs.num_single]):
            blocks = len(self._blocks(sequence, window))
            group = groups[-1][1] if groups else []
            if group and blocks <= 2 * len(self._blocks(group[0], window)) + 2 and blocks * (len(group) + 1) <= limit:
                group.append(sequence)
            else:
                groups.append((row, [sequence]))
        return groups

    def _blocks(self, sequence: SequenceStep, window: int | None) -> range:
        """Numbers of the sequence's blocks that hold what its rows see."""
        end = sequence.first_position + len(sequence.token_ids)
        first = 0 if window is None else max(0, sequence.first_position - window + 1)
        return range(first // self.block_size, -(-end // self.block_size))

    def _gather_rows(self, block_tables: Tensor) -> Tensor:
        """Rows of `head_blocks` in the order [2, sequences, H, blocks] for tables [sequences, blocks]."""
        kv = torch.arange(2, device=self.device).view(2, 1, 1, 1)
        head = torch.arange(self.num_heads, device=self.device).view(1, 1, -1, 1)
        return ((block_tables[None, :, None, :] * 2 + kv) * self.num_heads + head).flatten()

    def _single_group(self, group: list[SequenceStep], first: int, window: int | None) -> _SingleGroup:
        seen = [self._blocks(sequence, window) for sequence in group]
        num_blocks = max(map(len, seen))
        tables = [
            _padded(s.block_table[blocks.start : blocks.stop], num_blocks)
            for s, blocks in zip(group, seen, strict=True)
        ]
        offsets = [blocks.start * self.block_size for blocks in seen]
        ends = [sequence.first_position + 1 - offset for sequence, offset in zip(group, offsets, strict=True)]
        bounds = int_tensor((ends, [0 if window is None else end - window for end in ends]), self.device)[..., None]
        positions = torch.arange(num_blocks * self.block_size, device=self.device)
        hidden = (positions >= bounds[0]) | (positions < bounds[1])
        gather_rows = self._gather_rows(int_tensor(tables, self.device))
        return _SingleGroup(first, len(group), num_blocks, gather_rows, hidden[:, None, None])

    def _chunk(self, sequence: SequenceStep, first: int, window: int | None) -> _Chunk:
        count = len(sequence.token_ids)
        if sequence.first_position == 0:
            return _Chunk(first, count, count, None)
        blocks = self._blocks(sequence, window)
        context = sequence.first_position + count - blocks.start * self.block_size
        table = int_tensor([sequence.block_table[blocks.start : blocks.stop]], self.device)
        return _Chunk(first, count, context, self._gather_rows(table))

    def _slot_rows(self, inputs: StepInputs) -> Tensor:
        """Rows of `slots` [2, T * H] that take the new keys and values."""
        blocks = [
            sequence.block_table[position // self.block_size]
            for sequence in inputs.sequences
            for position in range(sequence.first_position, sequence.first_position + len(sequence.token_ids))
        ]
        kv = torch.arange(2, device=self.device).view(2, 1, 1)
        head = torch.arange(self.num_heads, device=self.device)
        rows = (int_tensor(blocks, self.device)[None, :, None] * 2 + kv) * self.num_heads + head
        return (rows * self.block_size + (inputs.positions % self.block_size)[None, :, None]).flatten(1)


class TorchAttentionStep:
    """See TorchAttention."""

    def __init__(self, backend: TorchAttention, inputs: StepInputs, slot_rows: Tensor) -> None:
        self._backend = backend
        self._inputs = inputs
        self._slot_rows = slot_rows
        self._views: dict[int | None, _View] = {}  # by window

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep."""
        head_dim = self._backend.head_dim
        slots = self._backend.slots[layer]
        slots.index_copy_(0, self._slot_rows[0], key.reshape(-1, head_dim))
        slots.index_copy_(0, self._slot_rows[1], value.reshape(-1, head_dim))
        view = self._view(rule.window)
        parts = [self._attend_singles(layer, query, group, rule) for group in view.groups]
        parts += [self._attend_chunk(layer, query, key, value, chunk, rule) for chunk in view.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _view(self, window: int | None) -> _View:
        if window not in self._views:
            self._views[window] = self._backend.view(self._inputs, window)
        return self._views[window]

    def _attend_singles(self, layer: int, query: Tensor, group: _SingleGroup, rule: AttentionRule) -> Tensor:
        backend = self._backend
        rows = query[group.first : group.first + group.count]
        context = group.num_blocks * backend.block_size
        gathered = backend.head_blocks[layer].index_select(0, group.gather_rows)
        keys, values = gathered.view(2, group.count, backend.num_heads, context, backend.head_dim).unbind()
        return attend_single(rows, keys, values, group.hidden, rule)

    def _attend_chunk(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, chunk: _Chunk, rule: AttentionRule
    ) -> Tensor:
        backend = self._backend
        rows = slice(chunk.first, chunk.first + chunk.count)
        if chunk.gather_rows is None:
            return attend_causal(query[rows], key[rows].transpose(0, 1), value[rows].transpose(0, 1), rule)
        gathered = backend.head_blocks[layer].index_select(0, chunk.gather_rows)
        keys, values = gathered.view(2, backend.num_heads, -1, backend.head_dim)[:, :, : chunk.context].unbind()
        return attend_causal(query[rows], keys, values, rule)


def _padded(block_table: tuple[int, ...], num_blocks: int) -> list[int]:
    table = list(block_table[:num_blocks])
    return table + table[:1] * (num_blocks - len(table))

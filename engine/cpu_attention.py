"""Attention on a CPU in float32: single tokens read their blocks where they lie, in compiled code. So do chunks where
the processor multiplies pairs of bfloat16; elsewhere they are computed as in torch.

Shapes: n sequences, T rows (tokens of the step), Q query heads, H KV heads, S tokens per block, D head size.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.kv_groups import KVGroup
from engine.attention_math import AttentionRule, attend_causal
from engine.batch import SequenceStep
from engine.cpu_library import CpuLibrary, Function
from engine.step_context import PagedCache, StepContext
from engine.step_inputs import StepInputs

CACHED_DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    """As cpu_attention.h has it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_query_heads", "num_heads", "block_size")),
        *((name, ctypes.c_int64) for name in ("head_dim", "query_stride", "table_stride", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class CpuAttention:
    """See AttentionBackend. Keys of a KV head are read once for all its query heads, then values."""

    def __init__(self, library: CpuLibrary, cache: Tensor, groups: Sequence[KVGroup]) -> None:
        """`cache`: [places, blocks, 2, H, S, D] of one of CACHED_DTYPES."""
        assert cache.dtype in CACHED_DTYPES and cache.is_contiguous()
        self.cache, self.paged = cache, PagedCache(cache, groups)
        self.library = library

    def plan(self, inputs: StepInputs) -> "CpuAttentionStep":
        """See AttentionBackend."""
        return CpuAttentionStep(self, inputs)

    def fixed(self, num_rows: int, blocks_per_row: int) -> None:
        """Nothing is recorded on a CPU."""


class CpuAttentionStep:
    """See CpuAttention."""

    def __init__(self, backend: CpuAttention, inputs: StepInputs) -> None:
        self._backend, self._num_threads = backend, torch.get_num_threads()
        cache = backend.cache
        _, _, _, self._num_heads, self._block_size, self._head_dim = cache.shape
        self._is_wide = cache.dtype == torch.float32
        self._inputs = inputs
        self._tables: dict[int, _Tables] = {}  # by number of the group
        has_chunks = inputs.num_single < len(inputs.sequences)
        attend_chunk = None if self._is_wide or self._head_dim % 2 else backend.library.attend_chunk
        self._attend_chunk = attend_chunk
        self._context = StepContext(backend.paged, inputs) if has_chunks and attend_chunk is None else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep."""
        cache = self._backend.cache
        number, place = self._backend.paged.place_of[layer]
        if number not in self._tables:
            self._tables[number] = _Tables(self._inputs, number, self._block_size)
        tables = self._tables[number]
        layer_at = cache.data_ptr() + place * cache.stride(0) * cache.element_size()
        self._backend.library.write(
            key.data_ptr(),
            value.data_ptr(),
            key.stride(0),
            value.stride(0),
            tables.slots.data_ptr(),
            layer_at,
            len(key),
            self._num_heads,
            self._block_size,
            self._head_dim,
            self._is_wide,
            self._num_threads,
        )
        attended = query.new_empty(len(query), query.shape[1] * self._head_dim)
        if tables.singles is not None:
            self._attend_singles(tables.singles, layer_at, query, rule, attended)
        if self._context is not None:
            key, value = key.to(cache.dtype), value.to(cache.dtype)
            for part in self._context.view(layer).chunks:
                keys, values = self._context.of_chunk(layer, part, key, value)
                attended[part.rows] = attend_causal(query[part.rows], keys, values, rule)
        elif self._attend_chunk is not None:
            for chunk in tables.chunks:
                self._attend_pairs(self._attend_chunk, chunk, layer_at, query[chunk.rows], rule, attended[chunk.rows])
        return attended

    def _attend_singles(
        self, singles: "_Singles", layer_at: int, query: Tensor, rule: AttentionRule, attended: Tensor
    ) -> None:
        sinks = None if rule.sinks is None else rule.sinks.float()
        shape = self._shape(len(singles.ends), query, singles.tables.shape[1], rule)
        self._backend.library.attend(
            ctypes.byref(shape),
            query.data_ptr(),
            layer_at,
            singles.tables.data_ptr(),
            singles.ends.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            attended.data_ptr(),
            self._is_wide,
            self._num_threads,
        )

    def _attend_pairs(
        self,
        attend_chunk: Function,
        chunk: "_Chunk",
        layer_at: int,
        query: Tensor,
        rule: AttentionRule,
        attended: Tensor,
    ) -> None:
        """Of the chunk's own rows."""
        sinks = None if rule.sinks is None else rule.sinks.float()
        attend_chunk(
            ctypes.byref(self._shape(len(query), query, 0, rule)),
            chunk.first_position,
            query.data_ptr(),
            layer_at,
            chunk.table.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            attended.data_ptr(),
            self._num_threads,
        )

    def _shape(self, num_rows: int, query: Tensor, table_stride: int, rule: AttentionRule) -> _Shape:
        return _Shape(
            num_rows,
            query.shape[1],
            self._num_heads,
            self._block_size,
            self._head_dim,
            query.stride(0),
            table_stride,
            rule.window or 0,
            rule.scale,
            rule.softcap or 0.0,
        )


@dataclass(frozen=True)
class _Chunk:
    """Several rows of the step that are of one sequence, and its blocks from the first position on."""

    rows: slice
    first_position: int
    table: Tensor  # [blocks] int64


class _Singles:
    """Where the contexts of single-token sequences lie; blocks behind a window are never read."""

    def __init__(self, inputs: StepInputs, number: int, block_size: int) -> None:
        sequences = inputs.sequences[: inputs.num_single]
        used = [_whole_table(sequence, number, block_size) for sequence in sequences]
        width = max(map(len, used))
        self.tables = torch.tensor([(*table, *(0,) * (width - len(table))) for table in used])  # [n, blocks] int64
        self.ends = torch.tensor([sequence.first_position + 1 for sequence in sequences])  # [n] int64


class _Tables:
    """What the layers of one KV group have in common."""

    def __init__(self, inputs: StepInputs, number: int, block_size: int) -> None:
        blocks = [
            sequence.block_tables[number].physical(position // block_size)
            for sequence in inputs.sequences
            for position in range(sequence.first_position, sequence.first_position + len(sequence.token_ids))
        ]
        self.slots = torch.tensor(blocks) * block_size + inputs.positions % block_size  # block * S + place in it, [T]
        self.singles = _Singles(inputs, number, block_size) if inputs.num_single else None
        self.chunks, first = list[_Chunk](), inputs.num_single
        for sequence in inputs.sequences[inputs.num_single :]:
            rows = slice(first, first + len(sequence.token_ids))
            table = torch.tensor(_whole_table(sequence, number, block_size))
            self.chunks.append(_Chunk(rows, sequence.first_position, table))
            first = rows.stop


def _whole_table(sequence: SequenceStep, number: int, block_size: int) -> tuple[int, ...]:
    """Blocks up to that of the step's last token; those that were given back are behind a window."""
    table, end = sequence.block_tables[number], sequence.first_position + len(sequence.token_ids)
    return ((0,) * table.first + table.blocks)[: -(-end // block_size)]

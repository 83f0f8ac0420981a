"""Attention on a CPU in float32: single tokens read their blocks where they lie, in compiled code; chunks as in torch.

Shapes: n sequences, T rows (tokens of the step), Q query heads, H KV heads, S tokens per block, D head size.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from core.kv_groups import KVGroup
from engine.attention_math import AttentionRule, attend_causal
from engine.cpu_library import CpuLibrary
from engine.step_context import PagedCache, StepContext
from engine.step_inputs import StepInputs

CACHED_DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    """As cpu_kernels.cpp has it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_query_heads", "num_heads", "block_size")),
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
        self._context = StepContext(backend.paged, inputs) if has_chunks else None

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
            for chunk in self._context.view(layer).chunks:
                keys, values = self._context.of_chunk(layer, chunk, key, value)
                attended[chunk.rows] = attend_causal(query[chunk.rows], keys, values, rule)
        return attended

    def _attend_singles(
        self, singles: "_Singles", layer_at: int, query: Tensor, rule: AttentionRule, attended: Tensor
    ) -> None:
        sinks = None if rule.sinks is None else rule.sinks.float()
        shape = _Shape(
            len(singles.ends),
            query.shape[1],
            self._num_heads,
            self._block_size,
            self._head_dim,
            query.stride(0),
            singles.tables.shape[1],
            rule.window or 0,
            rule.scale,
            rule.softcap or 0.0,
        )
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


class _Singles:
    """Where the contexts of single-token sequences lie; blocks behind a window are never read."""

    def __init__(self, inputs: StepInputs, number: int, block_size: int) -> None:
        sequences = inputs.sequences[: inputs.num_single]
        used = [
            ((0,) * table.first + table.blocks)[: sequence.first_position // block_size + 1]
            for sequence in sequences
            for table in (sequence.block_tables[number],)
        ]
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

"""Attention over keys and values by FlashInfer, which reads the cache where it lies.

Layers of one KV group and kind (window, soft cap, scale, sinks) share wrappers. In a step of any size those are planned
when the first layer of their kind comes; in one of fixed size, before the step, for all that came in earlier ones.
Shapes: T rows, Q query heads, H KV heads, D head size, S tokens per block.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.kv_groups import KVGroup, places_of
from engine.attention_math import AttentionRule
from engine.flashinfer_wrappers import LAYOUT, WORKSPACE_BYTES, CacheShape, Kind, Wrapper, make_wrapper
from engine.paged_rows import PagedRows, PageTables, fixed_tables, paged_rows
from engine.step_inputs import StepInputs

_Planned = Sequence[tuple[slice, Wrapper]]  # rows of the step, and what computes them


class FlashInferAttention:
    """An AttentionBackend."""

    def __init__(self, library: Any, cache: Tensor, groups: Sequence[KVGroup]) -> None:
        """`library`: the module flashinfer. `cache`: [places, blocks, 2, H, S, D]."""
        self._library = library
        self._cache = cache
        self._shape = CacheShape(*cache.shape[3:])
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        self._groups = groups
        self.place_of = places_of(groups)
        self._wrappers: dict[tuple[int, Kind, bool], Wrapper] = {}  # for steps of any size, by number of the group

    def plan(self, inputs: StepInputs) -> "FlashInferStep":
        """See AttentionBackend."""
        return FlashInferStep(self, inputs)

    def fixed(self, num_rows: int, blocks_per_row: int) -> "FixedFlashInferStep":
        """See AttentionBackend."""
        return FixedFlashInferStep(self, num_rows, num_rows * blocks_per_row)

    def rows(self, inputs: StepInputs, number: int) -> PagedRows:
        """What layers of the group of that number see."""
        return paged_rows(inputs, self._shape.block_size, number, self._groups[number], self._cache.device)

    def wrapper(self, number: int, kind: Kind, *, is_single: bool) -> Wrapper:
        """For steps of any size; one for all of them."""
        key = number, kind, is_single
        if key not in self._wrappers:
            self._wrappers[key] = self._make(kind, is_single=is_single)
        return self._wrappers[key]

    def fixed_wrapper(self, kind: Kind, tables: PageTables) -> Wrapper:
        """For single rows, reading `tables` wherever it is run."""
        return self._make(kind, is_single=True, fixed=tables)

    def attend(
        self,
        layer: int,
        tables: PageTables,
        planned: _Planned,
        query_key_value: tuple[Tensor, Tensor, Tensor],
        rule: AttentionRule,
    ) -> Tensor:
        """See AttentionStep."""
        query, key, value = query_key_value
        _, place = self.place_of[layer]
        cache = self._cache[place]
        self._library.append_paged_kv_cache(
            key,
            value,
            tables.owners,
            tables.positions,
            cache,
            tables.indices,
            tables.indptr,
            tables.last_page_len,
            kv_layout=LAYOUT,
        )
        attended = query.new_empty(query.shape)
        for rows, wrapper in planned:
            wrapper.run(query[rows], cache, rule, attended[rows])
        return attended.flatten(1)

    def _make(self, kind: Kind, *, is_single: bool, fixed: PageTables | None = None) -> Wrapper:
        return make_wrapper(self._library, self._workspace, kind, self._shape, is_single=is_single, fixed=fixed)


class FlashInferStep:
    """An AttentionStep of any size."""

    def __init__(self, backend: FlashInferAttention, inputs: StepInputs) -> None:
        self._backend = backend
        self._inputs = inputs
        self._rows: dict[int, PagedRows] = {}  # by number of the group
        self._planned: dict[tuple[int, Kind], _Planned] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep."""
        number, _ = self._backend.place_of[layer]
        if number not in self._rows:
            self._rows[number] = self._backend.rows(self._inputs, number)
        rows, kind = self._rows[number], Kind.of(query, rule)
        if (number, kind) not in self._planned:
            self._planned[number, kind] = self._plan(number, kind, rows)
        return self._backend.attend(layer, rows.tables, self._planned[number, kind], (query, key, value), rule)

    def _plan(self, number: int, kind: Kind, rows: PagedRows) -> _Planned:
        planned = []
        for part, is_single in ((rows.single, True), (rows.chunks, False)):
            if part is not None:
                wrapper = self._backend.wrapper(number, kind, is_single=is_single)
                wrapper.plan(part)
                planned.append((part.rows, wrapper))
        return planned


class FixedFlashInferStep:
    """A FixedAttentionStep. Each kind has tables of its own, from which its rows are written, too."""

    def __init__(self, backend: FlashInferAttention, num_rows: int, num_pages: int) -> None:
        self._backend = backend
        self._num_rows = num_rows
        self._num_pages = num_pages
        self._inputs: StepInputs | None = None
        self._kinds: dict[tuple[int, Kind], tuple[PageTables, Wrapper]] = {}  # by number of the group, too

    def renew(self, inputs: StepInputs) -> None:
        """See FixedAttentionStep."""
        self._inputs = inputs
        rows: dict[int, PagedRows] = {}
        for (number, _), (tables, wrapper) in self._kinds.items():
            if number not in rows:
                rows[number] = self._backend.rows(inputs, number)
            _renew(tables, wrapper, rows[number])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep. The first step of all plans as it goes."""
        number, _ = self._backend.place_of[layer]
        kind = Kind.of(query, rule)
        if (number, kind) not in self._kinds:
            assert self._inputs is not None, "renew comes first"
            tables = fixed_tables(self._num_rows, self._num_pages, query.device)
            self._kinds[number, kind] = tables, self._backend.fixed_wrapper(kind, tables)
            _renew(*self._kinds[number, kind], self._backend.rows(self._inputs, number))
        tables, wrapper = self._kinds[number, kind]
        return self._backend.attend(layer, tables, [(slice(0, self._num_rows), wrapper)], (query, key, value), rule)


def _renew(tables: PageTables, wrapper: Wrapper, rows: PagedRows) -> None:
    assert rows.single is not None and rows.chunks is None, "steps of fixed size have single rows"
    tables.take(rows.tables)
    wrapper.plan(rows.single)

"""Attention over latents by FlashInfer: single tokens attend to the latents where they lie; prompts go another way.

Chunks of prompts are left to LatentAttention, which makes keys and values of their context where that is faster.
All layers of such a model are of one kind, so that one wrapper serves them.
Shapes: T rows, Q query heads, L + R elements of a latent (see latent_up), S tokens per block.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from core.kv_groups import KVGroup
from engine.attention import AttentionStep
from engine.attention_math import AttentionRule
from engine.flashinfer_wrappers import WORKSPACE_BYTES
from engine.latent_attention import LatentAttention
from engine.paged_rows import PagedRows, PageTables, fixed_tables, paged_rows
from engine.step_inputs import StepInputs


class FlashInferLatentAttention:
    """An AttentionBackend."""

    def __init__(self, library: Any, cache: Tensor, groups: Sequence[KVGroup]) -> None:
        """`library`: the module flashinfer. `cache`: [layers, blocks, 1, 1, S, L + R]; all layers are in one group."""
        self._library = library
        self._latents = cache[:, :, 0, 0]
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        (self._group,) = groups
        self._singles = SingleLatents(library, self._workspace, self._latents, self._group, None)
        self._chunks = LatentAttention(cache, groups)

    def plan(self, inputs: StepInputs) -> "FlashInferLatentStep":
        """See AttentionBackend."""
        num_single = inputs.num_single
        if num_single:
            self._singles.renew(replace(inputs, sequences=inputs.sequences[:num_single]))
        chunks = inputs.sequences[num_single:]
        rest = replace(inputs, sequences=chunks, num_single=0, positions=inputs.positions[num_single:])
        return FlashInferLatentStep(num_single, self._singles, self._chunks.plan(rest) if chunks else None)

    def fixed(self, num_rows: int, blocks_per_row: int) -> "SingleLatents":
        """See AttentionBackend."""
        tables = fixed_tables(num_rows, num_rows * blocks_per_row, self._latents.device)
        return SingleLatents(self._library, self._workspace, self._latents, self._group, tables)


class FlashInferLatentStep:
    """An AttentionStep of any size."""

    def __init__(self, num_single: int, singles: "SingleLatents", chunks: AttentionStep | None) -> None:
        self._num_single = num_single
        self._singles = singles
        self._chunks = chunks

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep, and LatentAttentionStep for what key and value are."""
        n, parts = self._num_single, []
        if n:
            parts.append(self._singles.attend(layer, query[:n], key[:n], value[:n], rule))
        if self._chunks is not None:
            parts.append(self._chunks.attend(layer, query[n:], key[n:], value[n:], rule))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class SingleLatents:
    """A FixedAttentionStep where tables are given; else for steps of any number of single rows."""

    def __init__(
        self, library: Any, workspace: Tensor, latents: Tensor, group: KVGroup, tables: PageTables | None
    ) -> None:
        """`latents`: [layers, blocks, S, L + R]."""
        self._latents = latents
        self._group = group
        self._tables = tables
        self._slots = torch.empty(0, dtype=torch.int64, device=latents.device)  # [T]: where rows are written
        self._rows: PagedRows | None = None
        self._is_planned = False
        self._kind: tuple[int, int, torch.dtype, float] | None = None  # heads, L, dtype, scale
        buffers: dict[str, Any] = {}
        if tables is not None:
            num_rows = len(tables.last_page_len)
            self._slots = torch.zeros(num_rows, dtype=torch.int64, device=latents.device)
            buffers = {
                "use_cuda_graph": True,
                "qo_indptr": torch.arange(num_rows + 1, dtype=torch.int32, device=latents.device),
                "kv_indptr": tables.indptr,
                "kv_indices": tables.indices,
                "kv_len_arr": torch.zeros(num_rows, dtype=torch.int32, device=latents.device),
            }
        self._kernels = library.BatchMLAPagedAttentionWrapper(workspace, **buffers)

    def renew(self, inputs: StepInputs) -> None:
        """See FixedAttentionStep."""
        rows = self._rows = paged_rows(inputs, self._latents.shape[2], 0, self._group, self._latents.device)
        slots = self._slots_of(rows.tables)
        if self._tables is None:
            self._slots = slots
        else:
            self._tables.take(rows.tables)
            self._slots.copy_(slots)
        self._is_planned = False
        if self._kind is not None:
            self._plan(*self._kind)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See LatentAttentionStep."""
        up, size = rule.up, value.shape[-1]
        assert up is not None
        if not self._is_planned:
            self._kind = query.shape[1], size, query.dtype, rule.scale
            self._plan(*self._kind)
        latents = self._latents[layer]
        latents.view(-1, latents.shape[-1]).index_copy_(0, self._slots, key[:, 0])
        plain, rotated = up.absorb(query).tensor_split((size,), dim=-1)
        weighed: Tensor = self._kernels.run(plain, rotated, latents[..., :size], latents[..., size:])
        return up.values_of(weighed.flatten(1))

    def _plan(self, num_heads: int, size: int, dtype: torch.dtype, scale: float) -> None:
        assert self._rows is not None and self._rows.single is not None, "renew comes first"
        part, page_size = self._rows.single, self._latents.shape[2]
        self._kernels.plan(
            qo_indptr=part.row_indptr,
            kv_indptr=part.indptr,
            kv_indices=part.indices,
            kv_len_arr=part.num_seen(page_size),
            num_heads=num_heads,
            head_dim_ckv=size,
            head_dim_kpe=self._latents.shape[3] - size,
            page_size=page_size,
            causal=False,  # a single row sees all that is there
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        self._is_planned = True

    def _slots_of(self, tables: PageTables) -> Tensor:
        page_size = self._latents.shape[2]
        pages = tables.indices[tables.indptr[tables.owners] + tables.positions // page_size]
        return pages.long() * page_size + tables.positions % page_size

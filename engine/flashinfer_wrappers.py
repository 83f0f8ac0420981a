"""FlashInfer's wrappers for keys and values, one per kind of layer: planned once per step, run by every such layer.

A layer of our cache, [blocks, 2, H, S, D], is its layout "HND". Planning gets sizes from the host, so that it never
waits for the device. Fixed wrappers keep their tables in one place, so that what they launch can be replayed.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.attention_math import AttentionRule
from engine.paged_rows import PagePart, PageTables

LAYOUT = "HND"
WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends, for partial results of long contexts
_LARGEST_PLAIN_GROUP = 2  # query heads per KV head up to which decode is faster without tensor cores


class Kind(NamedTuple):
    """What kernels are compiled and planned for, beside the cache's shape."""

    num_query_heads: int
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool

    @classmethod
    def of(cls, query: Tensor, rule: AttentionRule) -> "Kind":
        """Of queries [T, Q, D]."""
        has_sinks = rule.sinks is not None
        return cls(query.shape[1], query.dtype, rule.scale, rule.window, rule.softcap, has_sinks)

    @property
    def window_left(self) -> int:
        """Positions that a query sees before its own; -1: all."""
        return -1 if self.window is None else self.window - 1


class CacheShape(NamedTuple):
    """H, S, D of a rank's cache."""

    num_heads: int
    block_size: int
    head_dim: int


class Wrapper(Protocol):
    """Kernels of one kind over some sequences of a step."""

    def plan(self, part: PagePart) -> None:
        """For the runs that follow."""
        ...

    def run(self, query: Tensor, cache: Tensor, rule: AttentionRule, out: Tensor) -> None:
        """`query`, `out` [T, Q, D] over a layer of the cache."""
        ...


def make_wrapper(
    library: Any,
    workspace: Tensor,
    kind: Kind,
    shape: CacheShape,
    *,
    is_single: bool,
    fixed: PageTables | None = None,
) -> Wrapper:
    """`is_single`: sequences have one row each. `fixed`: where the tables of a step of fixed size shall lie."""
    if is_single and not kind.has_sinks:
        return _DecodeWrapper(library, workspace, kind, shape, fixed)
    return _PrefillWrapper(library, workspace, kind, shape, fixed)


class _DecodeWrapper:
    def __init__(
        self, library: Any, workspace: Tensor, kind: Kind, shape: CacheShape, fixed: PageTables | None
    ) -> None:
        self._kind, self._shape = kind, shape
        group = kind.num_query_heads // shape.num_heads
        self._kernels = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            LAYOUT,
            use_cuda_graph=fixed is not None,
            use_tensor_cores=group > _LARGEST_PLAIN_GROUP,
            paged_kv_indptr_buffer=fixed and fixed.indptr,
            paged_kv_indices_buffer=fixed and fixed.indices,
            paged_kv_last_page_len_buffer=fixed and fixed.last_page_len,
        )

    def plan(self, part: PagePart) -> None:
        kind, shape = self._kind, self._shape
        self._kernels.plan(
            part.indptr,
            part.indices,
            part.last_page_len,
            kind.num_query_heads,
            shape.num_heads,
            shape.head_dim,
            shape.block_size,
            window_left=kind.window_left,
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
            sm_scale=kind.scale,
        )

    def run(self, query: Tensor, cache: Tensor, rule: AttentionRule, out: Tensor) -> None:  # noqa: ARG002
        self._kernels.run(query, cache, out=out)


class _PrefillWrapper:
    """Of sinks, FlashInfer has a wrapper for any number of rows, which takes them and the scale at each run."""

    def __init__(
        self, library: Any, workspace: Tensor, kind: Kind, shape: CacheShape, fixed: PageTables | None
    ) -> None:
        self._kind, self._shape = kind, shape
        buffers: dict[str, Any] = {}
        if fixed is not None:
            num_rows = len(fixed.last_page_len)
            buffers = {
                "use_cuda_graph": True,
                "qo_indptr_buf": torch.arange(num_rows + 1, dtype=torch.int32, device=workspace.device),
                "paged_kv_indptr_buf": fixed.indptr,
                "paged_kv_indices_buf": fixed.indices,
                "paged_kv_last_page_len_buf": fixed.last_page_len,
            }
        if kind.has_sinks:
            self._kernels = library.BatchAttentionWithAttentionSinkWrapper(
                workspace,
                LAYOUT,
                q_data_type=kind.dtype,
                kv_data_type=kind.dtype,
                head_dim_qk=shape.head_dim,
                head_dim_vo=shape.head_dim,
                window_left=kind.window_left,
                **buffers,
            )
        else:
            self._kernels = library.BatchPrefillWithPagedKVCacheWrapper(workspace, LAYOUT, **buffers)

    def plan(self, part: PagePart) -> None:
        kind, shape = self._kind, self._shape
        self._kernels.plan(
            part.row_indptr,
            part.indptr,
            part.indices,
            part.last_page_len,
            kind.num_query_heads,
            shape.num_heads,
            shape.head_dim,
            shape.block_size,
            causal=True,
            sm_scale=kind.scale,
            window_left=kind.window_left,
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )

    def run(self, query: Tensor, cache: Tensor, rule: AttentionRule, out: Tensor) -> None:
        extra = () if rule.sinks is None else (rule.sinks.float(), rule.scale)
        self._kernels.run(query, cache, *extra, out=out)

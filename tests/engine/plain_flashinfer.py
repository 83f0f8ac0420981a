"""FlashInfer's functions as far as the engine calls them, computed in plain torch from the very same arguments.

Every call must fit the signatures of all recorded versions (flashinfer_signatures.json). What planning is told is
checked as the real library checks it; what is computed is read from the buffers that the real kernels would read, which
under CUDA graphs are those of the constructor. So it proves the arguments, and nothing of the kernels.
"""

import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

RECORD = Path(__file__).with_name("flashinfer_signatures.json")
PLAIN_GROUPS = (1, 2, 3, 4, 8)  # query heads per KV head that decode computes without tensor cores


def recorded_signatures() -> dict[str, dict[str, inspect.Signature]]:
    """By version and name."""
    return {
        version: {name: _parsed(parameters) for name, parameters in names.items()}
        for version, names in json.loads(RECORD.read_text()).items()
    }


def _parsed(parameters: str) -> inspect.Signature:
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def function({parameters}): ...", scope)
    return inspect.signature(scope["function"])


SIGNATURES = recorded_signatures()


def arguments_of(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """By name, those left out as the defaults; the call must fit every recorded version."""
    for signatures in SIGNATURES.values():
        bound = signatures[name].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _ints(tensor: Tensor) -> list[int]:
    assert tensor.dtype == torch.int32
    return tensor.tolist()


class _Paged:
    """Tables and queries of one plan; under graphs in the constructor's buffers."""

    def __init__(self, workspace: Tensor, buffers: list[Tensor | None] | None) -> None:
        assert workspace.dtype == torch.uint8 and not workspace.any()
        self.buffers = buffers
        self.is_planned = False

    def take(self, tables: list[Tensor]) -> None:
        assert all(table.dtype == torch.int32 for table in tables)
        if self.buffers is None:
            self.tables = tables
        else:
            for buffer, table in zip(self.buffers, tables, strict=True):
                assert buffer is not None and len(table) <= len(buffer)
                buffer[: len(table)].copy_(table)
            self.tables = self.buffers
        self.is_planned = True


def _attend(query: Tensor, keys: Tensor, values: Tensor, plan: Any, causal: bool, sinks: Tensor | None) -> Tensor:
    """Queries [R, Q, D] are the last of C positions, keys and values [H, C, D]."""
    group = query.shape[1] // keys.shape[0]
    keys, values = (tensor.repeat_interleave(group, dim=0).float() for tensor in (keys, values))
    scores = torch.einsum("rqd,qcd->qrc", query.float(), keys) * plan["sm_scale"]
    if plan["logits_soft_cap"]:
        scores = plan["logits_soft_cap"] * torch.tanh(scores / plan["logits_soft_cap"])
    rows, context = len(query), keys.shape[1]
    distance = torch.arange(context - rows, context)[:, None] - torch.arange(context)
    if causal:
        scores.masked_fill_(distance < 0, float("-inf"))
    if plan["window_left"] >= 0:
        scores.masked_fill_(distance > plan["window_left"], float("-inf"))
    if sinks is not None:
        assert sinks.dtype == torch.float32
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, rows, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :context]
    return torch.einsum("qrc,qcd->rqd", weights, values).to(query.dtype)


def _gathered(cache: Tensor, pages: list[int], last_page_len: int) -> Tensor:
    """[2, H, C, D] of a layer [blocks, 2, H, S, D]."""
    found = torch.stack([cache[page] for page in pages]).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return found[:, :, : (len(pages) - 1) * cache.shape[3] + last_page_len]


class _KeyValueWrapper(_Paged):
    def compute(self, arguments: dict[str, Any], row_indptr: list[int], causal: bool) -> Tensor:
        assert self.is_planned
        query, cache, plan = arguments["q"], arguments["paged_kv_cache"], self.planned
        assert query.stride(-1) == 1 and query.dtype == plan["q_data_type"] and cache.dtype == plan["kv_data_type"]
        assert query.shape[1:] == (plan["num_qo_heads"], cache.shape[4])
        assert cache.shape[1:4] == (2, plan["num_kv_heads"], plan["page_size"])
        indptr, indices, last = map(_ints, self.tables)
        out = arguments["out"]
        assert out is not None and out.shape == query.shape and len(query) == row_indptr[-1]
        sinks = None
        if arguments["args"]:
            sinks, plan = arguments["args"][0], plan | {"sm_scale": arguments["args"][1]}
        for i, (first, end) in enumerate(pairwise(row_indptr)):
            assert indptr[i] < indptr[i + 1] and 1 <= last[i] <= plan["page_size"]
            keys, values = _gathered(cache, indices[indptr[i] : indptr[i + 1]], last[i])
            out[first:end] = _attend(query[first:end], keys, values, plan, causal, sinks)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_KeyValueWrapper):
    name = "BatchDecodeWithPagedKVCacheWrapper"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = arguments_of(f"{self.name}.__init__", self, *args, **kwargs)
        names = ("indptr", "indices", "last_page_len")
        assert given["kv_layout"] == "HND"
        buffers = [given[f"paged_kv_{name}_buffer"] for name in names] if given["use_cuda_graph"] else None
        super().__init__(given["float_workspace_buffer"], buffers)
        self.uses_tensor_cores = given["use_tensor_cores"]

    def plan(self, *args: Any, **kwargs: Any) -> None:
        given = self.planned = arguments_of(f"{self.name}.plan", self, *args, **kwargs)
        assert self.uses_tensor_cores or given["num_qo_heads"] // given["num_kv_heads"] in PLAIN_GROUPS
        if self.buffers is not None:
            assert len(given["last_page_len"]) == len(self.buffers[2]), "the batch size of a graph is fixed"
        self.take([given["indptr"], given["indices"], given["last_page_len"]])

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        given = arguments_of(f"{self.name}.run", self, *args, **kwargs)
        return self.compute(given, list(range(len(self.tables[2]) + 1)), causal=False)


class BatchPrefillWithPagedKVCacheWrapper(_KeyValueWrapper):
    name = "BatchPrefillWithPagedKVCacheWrapper"
    names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.made = arguments_of(f"{self.name}.__init__", self, *args, **kwargs)
        assert given["kv_layout"] == "HND"
        buffers = [given[f"{name}_buf"] for name in self.names] if given["use_cuda_graph"] else None
        super().__init__(given["float_workspace_buffer"], buffers)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        given = self.planned = arguments_of(f"{self.name}.plan", self, *args, **kwargs)
        tables = [given[name] for name in self.names]
        if self.buffers is not None:
            assert len(tables[0]) == len(self.buffers[0]), "the batch size of a graph is fixed"
        assert int(tables[0][0]) == int(tables[1][0]) == 0 and int(tables[1][-1]) == len(tables[2])
        assert given["causal"] and given["head_dim_vo"] is None
        self.take(tables)
        self.row_indptr, *self.tables = self.tables

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        given = arguments_of(f"{self.name}.run", self, *args, **kwargs)
        return self.compute(given, _ints(self.row_indptr), causal=True)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    name = "BatchAttentionWithAttentionSinkWrapper"

    def plan(self, *args: Any, **kwargs: Any) -> None:
        super().plan(*args, **kwargs)
        assert self.planned["window_left"] == self.made["window_left"] and not self.planned["logits_soft_cap"]
        assert self.planned["q_data_type"] == self.made["q_data_type"] == self.made["kv_data_type"]
        assert self.planned["head_dim_qk"] == self.made["head_dim_qk"] == self.made["head_dim_vo"]


class BatchMLAPagedAttentionWrapper(_Paged):
    name = "BatchMLAPagedAttentionWrapper"
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = arguments_of(f"{self.name}.__init__", self, *args, **kwargs)
        buffers = [given[name] for name in self.names] if given["use_cuda_graph"] else None
        super().__init__(given["float_workspace_buffer"], buffers)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.planned = arguments_of(f"{self.name}.plan", self, *args, **kwargs)
        self.take([self.planned[name] for name in self.names])

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        given, plan = arguments_of(f"{self.name}.run", self, *args, **kwargs), self.planned
        query = torch.cat((given["q_nope"], given["q_pe"]), dim=-1)
        latents = torch.cat((given["ckv_cache"], given["kpe_cache"]), dim=-1)  # [blocks, S, L + R]
        assert given["ckv_cache"].shape[1:] == (plan["page_size"], plan["head_dim_ckv"])
        assert given["kpe_cache"].shape[2] == plan["head_dim_kpe"] and query.shape[1] == plan["num_heads"]
        assert query.dtype == plan["q_data_type"] and latents.dtype == plan["kv_data_type"]
        rows, indptr, indices, lengths = map(_ints, self.tables)
        out = torch.empty_like(given["q_nope"])
        for i, length in enumerate(lengths):
            pages = indices[indptr[i] : indptr[i + 1]]
            seen = torch.cat([latents[page] for page in pages])[None, :length]
            part = query[rows[i] : rows[i + 1]]
            values = seen[..., : plan["head_dim_ckv"]]
            uncapped = {"sm_scale": plan["sm_scale"], "logits_soft_cap": None, "window_left": -1}
            out[rows[i] : rows[i + 1]] = _attend(part, seen, values, uncapped, plan["causal"], None)
        return out


def append_paged_kv_cache(*args: Any, **kwargs: Any) -> None:
    given = arguments_of("append_paged_kv_cache", *args, **kwargs)
    assert given["kv_layout"] == "HND" and given["append_key"].stride(-1) == given["append_value"].stride(-1) == 1
    indptr, indices, _ = (_ints(given[name]) for name in ("kv_indptr", "kv_indices", "kv_last_page_len"))
    cache = given["paged_kv_cache"]
    rows = zip(_ints(given["batch_indices"]), _ints(given["positions"]), strict=True)
    for row, (owner, position) in enumerate(rows):
        page, slot = indices[indptr[owner] + position // cache.shape[3]], position % cache.shape[3]
        cache[page, 0, :, slot] = given["append_key"][row]
        cache[page, 1, :, slot] = given["append_value"][row]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _norm(name: str, args: Any, kwargs: Any, offset: float) -> Tensor:
    given = arguments_of(name, *args, **kwargs)
    assert given["input"].dtype == given["weight"].dtype and given["input"].dim() in (2, 3)
    return _normed(given["input"], given["weight"] + offset, given["eps"])


def _add_norm(name: str, args: Any, kwargs: Any, offset: float) -> None:
    given = arguments_of(name, *args, **kwargs)
    assert given["input"].dtype == given["residual"].dtype == given["weight"].dtype
    given["residual"].add_(given["input"])
    given["input"].copy_(_normed(given["residual"], given["weight"] + offset, given["eps"]))


def rmsnorm(*args: Any, **kwargs: Any) -> Tensor:
    return _norm("rmsnorm", args, kwargs, 0.0)


def gemma_rmsnorm(*args: Any, **kwargs: Any) -> Tensor:
    return _norm("gemma_rmsnorm", args, kwargs, 1.0)


def fused_add_rmsnorm(*args: Any, **kwargs: Any) -> None:
    _add_norm("fused_add_rmsnorm", args, kwargs, 0.0)


def gemma_fused_add_rmsnorm(*args: Any, **kwargs: Any) -> None:
    _add_norm("gemma_fused_add_rmsnorm", args, kwargs, 1.0)


def silu_and_mul(*args: Any, **kwargs: Any) -> Tensor:
    gate, up = arguments_of("silu_and_mul", *args, **kwargs)["input"].chunk(2, dim=-1)
    return silu(gate) * up


def gelu_tanh_and_mul(*args: Any, **kwargs: Any) -> Tensor:
    gate, up = arguments_of("gelu_tanh_and_mul", *args, **kwargs)["input"].chunk(2, dim=-1)
    return gelu(gate, approximate="tanh") * up


def apply_rope_with_cos_sin_cache_inplace(*args: Any, **kwargs: Any) -> None:
    given = arguments_of("apply_rope_with_cos_sin_cache_inplace", *args, **kwargs)
    assert given["cos_sin_cache"].dtype == torch.float32
    angles = given["cos_sin_cache"][given["positions"].long()]
    cosines, sines = angles[:, None].chunk(2, dim=-1)
    rotated = angles.shape[-1]
    for flat in (given["query"], given["key"]):
        heads = flat.view(len(flat), -1, given["head_size"])[..., :rotated]
        if given["is_neox"]:
            one, other = heads.chunk(2, dim=-1)
        else:
            one, other = heads[..., ::2], heads[..., 1::2]
        turned = one * cosines - other * sines, other * cosines + one * sines
        one.copy_(turned[0])
        other.copy_(turned[1])

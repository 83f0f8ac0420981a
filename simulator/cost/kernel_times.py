"""Seconds of single kernels on one GPU, by formulas of few coefficients each, fitted to measured kernels. Pure.

All are sums of what a kernel must do (bytes, operations, starts), since that is how measured times grow; `fit_kernels`
made the coefficients and prints how far from the tables they are. Shapes are of one rank.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from simulator.cost.gpu_spec import LINKS, LinkKind

HOST_RANKS = 8
NETWORK_S = 10e-6  # from a rank of one host to that of another
EXPERT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4": 0.5, "mxfp4": 0.53}  # of one stored weight


@dataclass(frozen=True)
class Products:
    """[rows, k] x [k, n]: per_nk * n * k + per_n * n + per_k * k + fixed, each between two `rows` by straight line."""

    rows: tuple[int, ...]
    per_nk: tuple[float, ...]
    per_n: tuple[float, ...]
    per_k: tuple[float, ...]
    fixed: tuple[float, ...]

    def seconds(self, num_rows: int, n: int, k: int) -> float:
        """Of one product."""
        return _between(self.rows, num_rows, lambda i: self._at(i, n, k))

    def _at(self, i: int, n: int, k: int) -> float:
        return self.per_nk[i] * n * k + self.per_n[i] * n + self.per_k[i] * k + self.fixed[i]


@dataclass(frozen=True)
class Experts:
    """A mixture's experts of `expert_terms`, each between two `rows` (tokens) by straight line."""

    rows: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]  # by row

    def seconds(self, num_tokens: int, terms: Callable[[int], Sequence[float]]) -> float:
        """`terms` are those of so many tokens."""
        return _between(self.rows, num_tokens, lambda i: _dot(self.coefficients[i], terms(self.rows[i])))


@dataclass(frozen=True)
class KernelTimes:
    """Of one kind of GPU. Attention is in bfloat16, by size of a head."""

    products: Mapping[str, Products]  # by dtype of the weights
    context: Mapping[int, tuple[float, ...]]
    generation: Mapping[int, tuple[float, ...]]
    experts: Mapping[str, Experts]  # by dtype of the weights
    all_reduce: Mapping[int, tuple[float, ...]]  # by number of ranks

    def product_s(self, dtype: str, num_rows: int, n: int, k: int) -> float:
        """A linear layer, the quantisation of its input included."""
        return self.products[dtype].seconds(num_rows, n, k)

    def context_attention_s(self, num_tokens: int, context: int, heads: int, kv_heads: int, head_dim: int) -> float:
        """A chunk of a prompt, causal, behind `context` tokens."""
        return _dot(
            self.context[_nearest(self.context, head_dim)],
            context_attention_terms(1, num_tokens, context, heads, kv_heads, head_dim),
        )

    def generation_attention_s(
        self, batch: int, num_kv_tokens: float, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """One token of each of `batch` sequences over `num_kv_tokens` together; linear in these."""
        return _dot(
            self.generation[_nearest(self.generation, head_dim)],
            generation_attention_terms(batch, num_kv_tokens / batch, heads, kv_heads, head_dim),
        )

    def experts_s(
        self, dtype: str, num_tokens: int, hidden: int, inner: int, per_token: int, num_experts: int, ranks: int = 1
    ) -> float:
        """A mixture's experts: `inner` is a rank's part of each expert's; whole experts are shared by `ranks`."""

        def terms(num: int) -> Sequence[float]:
            return expert_terms(dtype, num, hidden, inner, per_token, num_experts, ranks)

        return self.experts[dtype].seconds(num_tokens, terms)

    def all_reduce_s(self, num_bytes: float, ranks: int) -> float:
        """A sum over ranks. Beyond those of one host: within each host, and of every rank's part of it by network."""
        if ranks == 1:
            return 0.0
        within_s = _dot(self.all_reduce[_nearest(self.all_reduce, ranks)], (1.0, num_bytes))
        if ranks <= HOST_RANKS:
            return within_s
        num_hosts, link = ranks / HOST_RANKS, LINKS[LinkKind.INFINIBAND]
        part = num_bytes / HOST_RANKS * 2 * (num_hosts - 1) / num_hosts
        return within_s + 2 * NETWORK_S + part / link.bytes_per_s


def context_attention_terms(
    batch: int, num_tokens: int, context: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[float, ...]:
    """Operations, bytes of K and V, rows of the softmax, one start."""
    operations = 4.0 * batch * heads * head_dim * num_tokens * (num_tokens / 2 + context)
    kv_bytes = 4.0 * batch * (num_tokens + context) * kv_heads * head_dim
    return operations, kv_bytes, float(batch * heads * num_tokens), 1.0


def generation_attention_terms(
    batch: int, length: float, heads: int, kv_heads: int, head_dim: int
) -> tuple[float, ...]:
    """Bytes of K and V, bytes of queries, sequences and heads, operations, the longest way through K, one start."""
    kv_bytes = 4.0 * batch * length * kv_heads * head_dim
    query_bytes = 4.0 * batch * heads * head_dim
    operations = 4.0 * batch * heads * head_dim * length
    return kv_bytes, query_bytes, float(batch * kv_heads), operations, length, 1.0


def expert_terms(
    dtype: str, num_tokens: int, hidden: int, inner: int, per_token: int, num_experts: int, ranks: int
) -> tuple[float, ...]:
    """Bytes of the experts that any token chose, operations, bytes in and out, copies to experts, experts, one start;
    and when whole experts are shared by ranks, copies to experts and one start of the kernels that are used then.

    Of E experts, T tokens that choose k each leave out a share (1 - k / E) ** T.
    """
    local = num_experts / ranks
    chosen = num_tokens * per_token / ranks
    active = local * (1 - (1 - per_token / num_experts) ** num_tokens)
    weights = active * 3 * hidden * inner * EXPERT_BYTES[dtype]
    copies, shared = 2.0 * chosen * hidden, float(ranks > 1)
    operations = 6.0 * chosen * hidden * inner
    return weights, operations, 2.0 * num_tokens * hidden, copies, local, 1.0, shared * copies, shared


@cache
def kernel_times(gpu: str) -> KernelTimes:
    """Of a GPU by its name in GPUS."""
    found: Any = json.loads(files("simulator.cost").joinpath("kernels.json").read_text())[gpu]
    return KernelTimes(
        {
            dtype: Products(**{name: tuple(values) for name, values in p.items()})
            for dtype, p in found["products"].items()
        },
        {int(size): tuple(values) for size, values in found["context"].items()},
        {int(size): tuple(values) for size, values in found["generation"].items()},
        {
            dtype: Experts(tuple(e["rows"]), tuple(map(tuple, e["coefficients"])))
            for dtype, e in found["experts"].items()
        },
        {int(ranks): tuple(values) for ranks, values in found["all_reduce"].items()},
    )


def _between(rows: Sequence[int], num: int, at: Callable[[int], float]) -> float:
    """`at` says the seconds of each of `rows`; more than the last cost as much each as the last ones."""
    if num >= rows[-1]:
        return at(len(rows) - 1) * num / rows[-1]
    right = max(1, bisect_right(rows, num))
    low, high = rows[right - 1], rows[right]
    share = max(0.0, (num - low) / (high - low))
    return at(right - 1) * (1 - share) + at(right) * share


def _nearest(table: Mapping[int, Sequence[float]], size: int) -> int:
    return min(table, key=lambda known: abs(known - size))


def _dot(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    return sum(c * term for c, term in zip(coefficients, terms, strict=True))

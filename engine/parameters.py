"""What one rank holds of a model: its parameters in the order in which they are loaded, cut out of stored tensors.

Column-split matrices (QKV, gate/up, embedding, head) are cut along their outputs, row-split ones (attention output,
MLP down) along their inputs. KV heads are replicated when there are more ranks than heads.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from core.kv_layout import DTYPE_BYTES, KVLayout
from engine.checkpoint import ModelSpec

WHOLE = range(0)  # the full extent of a dimension


@dataclass(frozen=True)
class Part:
    """A rectangle of a stored tensor, whose full shape must be `shape`."""

    name: str
    shape: tuple[int, ...]
    rows: range = WHOLE
    columns: range = WHOLE

    @property
    def taken(self) -> tuple[int, ...]:
        """The rectangle's shape."""
        ranges = (self.rows, self.columns)[: len(self.shape)]
        return tuple(len(taken) or full for taken, full in zip(ranges, self.shape, strict=True))


@dataclass(frozen=True)
class Parameter:
    """A tensor of one rank: parts of stored tensors, stacked along their rows, then zeros up to `shape`."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def num_bytes(self, dtype: str) -> int:
        """Of memory."""
        return prod(self.shape) * DTYPE_BYTES[dtype]


ReadParameters = Callable[[Sequence[Parameter]], Iterator[Tensor]]  # in their order, on the rank's device


def list_parameters(spec: ModelSpec, layout: KVLayout, rank: int) -> tuple[Parameter, ...]:
    """All of rank `rank`, the largest last. Embedding and head hold the rows [rank * rows, (rank + 1) * rows) of the
    vocabulary.
    """
    found = [
        parameter for index in range(spec.num_layers) for parameter in _block_parameters(index, spec, layout, rank)
    ]
    found.append(_stacked("final_norm", Part("model.norm.weight", (spec.hidden_size,))))
    found.append(_vocabulary("embedding", "model.embed_tokens.weight", spec, layout, rank))
    if not spec.tie_word_embeddings:
        found.append(_vocabulary("head", "lm_head.weight", spec, layout, rank))
    return tuple(found)


def fingerprint(parameters: Sequence[Parameter]) -> str:
    """Equal where the same parameters are laid out alike."""
    return hashlib.blake2b(repr(parameters).encode(), digest_size=16).hexdigest()


def _block_parameters(index: int, spec: ModelSpec, layout: KVLayout, rank: int) -> Iterator[Parameter]:
    stored, block = f"model.layers.{index}.", f"blocks.{index}."
    features, hidden, inner, size = spec.features, spec.hidden_size, spec.intermediate_size, layout.tensor_parallel
    query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    heads = layout.heads_of_rank(rank)
    query_rows, mlp_rows = _share(query_size, rank, size), _share(inner, rank, size)
    kv_rows = range(heads.start * spec.head_dim, heads.stop * spec.head_dim)

    def norm(name: str, stored_name: str, length: int) -> Parameter:
        return _stacked(block + name, Part(f"{stored}{stored_name}.weight", (length,)))

    def column_split(name: str, parts: Sequence[tuple[str, int, range]], bias: bool) -> Iterator[Parameter]:
        yield _stacked(block + name, *(Part(f"{stored}{n}.weight", (full, hidden), rows) for n, full, rows in parts))
        if bias:
            yield _stacked(
                f"{block}{name}_bias", *(Part(f"{stored}{n}.bias", (full,), rows) for n, full, rows in parts)
            )

    def row_split(name: str, stored_name: str, full: int, columns: range, bias: bool) -> Iterator[Parameter]:
        yield _stacked(block + name, Part(f"{stored}{stored_name}.weight", (hidden, full), columns=columns))
        if bias and rank == 0:  # the ranks' products are summed, so only one of them adds the bias
            yield _stacked(f"{block}{name}_bias", Part(f"{stored}{stored_name}.bias", (hidden,)))

    yield norm("input_norm", "input_layernorm", hidden)
    qkv = [("self_attn.q_proj", query_size, query_rows)]
    qkv += [(f"self_attn.{name}_proj", kv_size, kv_rows) for name in ("k", "v")]
    yield from column_split("qkv", qkv, features.qkv_bias)
    if features.qk_norm:
        yield norm("query_norm", "self_attn.q_norm", spec.head_dim)
        yield norm("key_norm", "self_attn.k_norm", spec.head_dim)
    yield from row_split("output", "self_attn.o_proj", query_size, query_rows, features.output_bias)
    yield norm("mlp_norm", "post_attention_layernorm", hidden)
    gate_up = [(f"mlp.{name}_proj", inner, mlp_rows) for name in ("gate", "up")]
    yield from column_split("gate_up", gate_up, features.mlp_bias)
    yield from row_split("down", "mlp.down_proj", inner, mlp_rows, features.mlp_bias)


def _vocabulary(name: str, stored_name: str, spec: ModelSpec, layout: KVLayout, rank: int) -> Parameter:
    num_rows = -(-spec.vocab_size // layout.tensor_parallel)
    rows = range(min(rank * num_rows, spec.vocab_size), min((rank + 1) * num_rows, spec.vocab_size))
    parts = (Part(stored_name, (spec.vocab_size, spec.hidden_size), rows),) if rows else ()
    return Parameter(name, (num_rows, spec.hidden_size), parts)


def _stacked(name: str, *parts: Part) -> Parameter:
    taken = [part.taken for part in parts]
    return Parameter(name, (sum(rows for rows, *_ in taken), *taken[0][1:]), parts)


def _share(total: int, rank: int, size: int) -> range:
    return range(total * rank // size, total * (rank + 1) // size)

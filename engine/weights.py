"""Loads one rank's share of a safetensors checkpoint, reading only the slices that it needs.

Column-split matrices (QKV, gate/up, embedding, head) are cut along their outputs, row-split ones (attention output,
MLP down) along their inputs. KV heads are replicated when there are more ranks than heads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ConfigurationError
from core.kv_layout import KVLayout
from engine.checkpoint import ModelSpec, weight_files
from engine.linear import Linear

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE = range(0)  # read the full extent of a dimension


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block of one rank."""

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class ModelWeights:
    """All weights of one rank. `embedding` and `head` hold the rows [rank * rows, (rank + 1) * rows) of the vocabulary,
    zero beyond its end.
    """

    embedding: Tensor  # [rows, hidden]
    blocks: tuple[BlockWeights, ...]
    final_norm: Tensor
    head: Linear  # hidden -> rows


class _Checkpoint:
    """Tensors by name over all files, cast and moved as they are read."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}
        for file in weight_files(path):
            try:
                opened = safe_open(str(file), framework="pt")
            except SafetensorError as error:
                raise ConfigurationError(f"cannot read {file}: {error}") from error
            self._files.update((name, opened) for name in opened.keys())  # type: ignore[no-untyped-call]  # noqa: SIM118

    def read(self, name: str, shape: tuple[int, ...], rows: range = WHOLE, columns: range = WHOLE) -> Tensor:
        """A part of a tensor whose full shape must be `shape`. Raises ConfigurationError naming the tensor."""
        if name not in self._files:
            raise ConfigurationError(f"the checkpoint has no tensor {name!r}")
        stored = self._files[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ConfigurationError(f"tensor {name!r} has shape {tuple(stored.get_shape())}, the config asks {shape}")
        row_part = slice(rows.start, rows.stop) if rows else slice(None)
        part = stored[row_part, columns.start : columns.stop] if columns else stored[row_part]
        return part.to(device=self._device, dtype=self._dtype)  # type: ignore[no-any-return]


def load_weights(spec: ModelSpec, path: Path, layout: KVLayout, rank: int, device: torch.device) -> ModelWeights:
    """Reads rank `rank`'s share. Raises ConfigurationError naming a missing or misshapen tensor."""
    checkpoint = _Checkpoint(path, TORCH_DTYPES[spec.dtype], device)
    size = layout.tensor_parallel
    embedding = _vocabulary_rows(checkpoint, "model.embed_tokens.weight", spec, rank, size)
    head = embedding
    if not spec.tie_word_embeddings:
        head = _vocabulary_rows(checkpoint, "lm_head.weight", spec, rank, size)
    blocks = tuple(_load_block(checkpoint, spec, layout, rank, index) for index in range(spec.num_layers))
    return ModelWeights(embedding, blocks, checkpoint.read("model.norm.weight", (spec.hidden_size,)), Linear(head))


def _load_block(checkpoint: _Checkpoint, spec: ModelSpec, layout: KVLayout, rank: int, index: int) -> BlockWeights:
    prefix, features, hidden = f"model.layers.{index}.", spec.features, spec.hidden_size
    query_size, kv_size, inner = (
        spec.num_heads * spec.head_dim,
        spec.num_kv_heads * spec.head_dim,
        spec.intermediate_size,
    )
    query_rows = _share(query_size, rank, layout.tensor_parallel)
    heads = layout.heads_of_rank(rank)
    kv_rows = range(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    mlp_rows = _share(inner, rank, layout.tensor_parallel)

    def column_split(parts: list[tuple[str, int, range]], bias: bool) -> Linear:
        weights = [checkpoint.read(f"{prefix}{name}.weight", (size, hidden), rows) for name, size, rows in parts]
        biases = [checkpoint.read(f"{prefix}{name}.bias", (size,), rows) for name, size, rows in parts if bias]
        return Linear(torch.cat(weights), torch.cat(biases) if bias else None)

    def row_split(name: str, size: int, columns: range, bias: bool) -> Linear:
        weight = checkpoint.read(f"{prefix}{name}.weight", (hidden, size), columns=columns)
        # the ranks' products are summed, so only one of them adds the bias
        has_bias = bias and rank == 0
        return Linear(weight.contiguous(), checkpoint.read(f"{prefix}{name}.bias", (hidden,)) if has_bias else None)

    def norm(name: str, size: int) -> Tensor:
        return checkpoint.read(f"{prefix}{name}.weight", (size,))

    qkv = [("self_attn.q_proj", query_size, query_rows)]
    qkv += [(f"self_attn.{name}_proj", kv_size, kv_rows) for name in ("k", "v")]
    gate_up = [(f"mlp.{name}_proj", inner, mlp_rows) for name in ("gate", "up")]
    return BlockWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=column_split(qkv, features.qkv_bias),
        query_norm=norm("self_attn.q_norm", spec.head_dim) if features.qk_norm else None,
        key_norm=norm("self_attn.k_norm", spec.head_dim) if features.qk_norm else None,
        output=row_split("self_attn.o_proj", query_size, query_rows, features.output_bias),
        mlp_norm=norm("post_attention_layernorm", hidden),
        gate_up=column_split(gate_up, features.mlp_bias),
        down=row_split("mlp.down_proj", inner, mlp_rows, features.mlp_bias),
    )


def _share(total: int, rank: int, size: int) -> range:
    return range(total * rank // size, total * (rank + 1) // size)


def _vocabulary_rows(checkpoint: _Checkpoint, name: str, spec: ModelSpec, rank: int, size: int) -> Tensor:
    num_rows = -(-spec.vocab_size // size)
    rows = range(min(rank * num_rows, spec.vocab_size), min((rank + 1) * num_rows, spec.vocab_size))
    shape = (spec.vocab_size, spec.hidden_size)
    part = checkpoint.read(name, shape, rows) if rows else checkpoint.read(name, shape, range(1))[:0]
    return torch.nn.functional.pad(part, (0, 0, 0, num_rows - len(rows))) if len(rows) < num_rows else part

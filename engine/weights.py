"""The weights of one rank, put together from its parameters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.checkpoint import ModelSpec
from engine.linear import Linear

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

StoredAs = Callable[[], Tensor]  # a parameter as it was loaded, which may have to be made first


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
    parameters: tuple[StoredAs, ...]  # in the order of `list_parameters`


class _Loading:
    """Takes parameters in their order, as weights ask for them by name."""

    def __init__(self, named: Iterator[tuple[str, Tensor]]) -> None:
        self._named = named
        self.taken: list[StoredAs] = []

    def tensor(self, name: str) -> Tensor:
        """Kept as it is."""
        tensor = self._next(name)
        self.taken.append(lambda: tensor)
        return tensor

    def linear(self, name: str, has_bias: bool) -> Linear:
        """May be repacked, so the parameter passed in is not kept."""
        weight = self._next(name)
        made = Linear(weight, self._next(f"{name}_bias") if has_bias else None)
        self.taken += [made.rows] if made.bias is None else [made.rows, partial(_same, made.bias)]
        return made

    def _next(self, name: str) -> Tensor:
        came, tensor = next(self._named)
        assert came == name, f"parameter {came} came for {name}"
        return tensor


def assemble(spec: ModelSpec, rank: int, named: Iterator[tuple[str, Tensor]]) -> ModelWeights:
    """`named`: parameters and their names, in the order of `list_parameters`."""
    loading, features = _Loading(named), spec.features
    is_first = rank == 0
    blocks = []
    for index in range(spec.num_layers):
        name = f"blocks.{index}."
        blocks.append(
            BlockWeights(
                input_norm=loading.tensor(f"{name}input_norm"),
                qkv=loading.linear(f"{name}qkv", features.qkv_bias),
                query_norm=loading.tensor(f"{name}query_norm") if features.qk_norm else None,
                key_norm=loading.tensor(f"{name}key_norm") if features.qk_norm else None,
                output=loading.linear(f"{name}output", features.output_bias and is_first),
                mlp_norm=loading.tensor(f"{name}mlp_norm"),
                gate_up=loading.linear(f"{name}gate_up", features.mlp_bias),
                down=loading.linear(f"{name}down", features.mlp_bias and is_first),
            )
        )
    final_norm, embedding = loading.tensor("final_norm"), loading.tensor("embedding")
    head = Linear(embedding) if spec.tie_word_embeddings else loading.linear("head", has_bias=False)
    return ModelWeights(embedding, tuple(blocks), final_norm, head, tuple(loading.taken))


def _same(tensor: Tensor) -> Tensor:
    return tensor

"""Attention over the paged KV cache: the interface, and its implementation for keys and values in plain torch.

Shapes: T rows (tokens of the step), Q query heads, H KV heads, D head size.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from core.kv_groups import KVGroup
from engine.attention_math import AttentionRule, attend_causal, attend_single
from engine.step_context import Chunk, PagedCache, SingleGroup, StepContext
from engine.step_inputs import StepInputs


class AttentionStep(Protocol):
    """Attention in all layers of one step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """Writes key and value [T, H, D] to the cache, rounded to its dtype, then query [T, Q, D] attends to what the
        rule lets it see of its context: [T, Q * D] in the dtype of the query.
        """
        ...


class FixedAttentionStep(AttentionStep, Protocol):
    """Attention in all layers of steps of as many single rows: what it reads stays in one place on the device."""

    def renew(self, inputs: StepInputs) -> None:
        """For the next of them. Never waits for the device."""
        ...


class AttentionBackend(Protocol):
    """Knows the cache, and prepares once per step what all layers share."""

    def plan(self, inputs: StepInputs) -> AttentionStep:
        """Never waits for the device."""
        ...

    def fixed(self, num_rows: int, blocks_per_row: int) -> FixedAttentionStep | None:
        """For steps of so many single rows, of at most so many blocks each; None where there is no such attention."""
        ...


class TorchAttention:
    """Gathers blocks into contiguous keys and values, then plain products. Runs on CPU and CUDA."""

    def __init__(self, cache: Tensor, groups: Sequence[KVGroup]) -> None:
        """`cache`: [places, blocks, 2, H, S, D], S tokens per block."""
        self._cache = PagedCache(cache, groups)

    def plan(self, inputs: StepInputs) -> "TorchAttentionStep":
        """See AttentionBackend."""
        return TorchAttentionStep(StepContext(self._cache, inputs))

    def fixed(self, num_rows: int, blocks_per_row: int) -> None:
        """What is gathered depends on the step."""


class TorchAttentionStep:
    """See TorchAttention."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep."""
        context = self._context
        key, value = key.to(context.dtype), value.to(context.dtype)
        context.write(layer, key, value)

        def singles(group: SingleGroup) -> Tensor:
            keys, values = context.of_singles(layer, group)
            return attend_single(query[group.rows], keys, values, group.hidden, rule)

        def chunk(one: Chunk) -> Tensor:
            keys, values = context.of_chunk(layer, one, key, value)
            return attend_causal(query[one.rows], keys, values, rule)

        return context.view(layer).attend(singles, chunk)

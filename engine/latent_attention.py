"""Attention over a paged cache of latents, which all query heads share: [places, blocks, 1, 1, S, L + R].

Shapes: T rows, Q query heads, L + R elements of a latent (see latent_up), S tokens per block.
"""

from collections.abc import Sequence

from torch import Tensor

from core.kv_groups import KVGroup
from engine.attention_math import AttentionRule, attend_causal, attend_single
from engine.latent_up import LatentUp
from engine.step_context import Chunk, PagedCache, SingleGroup, StepContext
from engine.step_inputs import StepInputs


class LatentAttention:
    """Single tokens attend to the latents themselves, chunks to keys and values made of them where that is faster."""

    def __init__(self, cache: Tensor, groups: Sequence[KVGroup]) -> None:
        self._cache = PagedCache(cache, groups)

    def plan(self, inputs: StepInputs) -> "LatentAttentionStep":
        """See AttentionBackend."""
        return LatentAttentionStep(StepContext(self._cache, inputs))

    def fixed(self, num_rows: int, blocks_per_row: int) -> None:
        """What is gathered depends on the step."""


class LatentAttentionStep:
    """See LatentAttention."""

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """See AttentionStep. `key` is the latents [T, 1, L + R], `value` their first part [T, 1, L], which lies in the
        cache with them; the result is made of values as the rule's matrices bring them up.
        """
        context, up, size = self._context, rule.up, value.shape[-1]
        assert up is not None
        key = key.to(context.dtype)
        context.write(layer, key)

        def singles(group: SingleGroup) -> Tensor:
            (latents,) = context.of_singles(layer, group)
            absorbed = up.absorb(query[group.rows])
            return up.values_of(attend_single(absorbed, latents, latents[..., :size], group.hidden, rule))

        def chunk(one: Chunk) -> Tensor:
            (latents,) = context.of_chunk(layer, one, key)
            return _attend_chunk(query[one.rows], latents, size, up, rule)

        return context.view(layer).attend(singles, chunk)


def _attend_chunk(query: Tensor, latents: Tensor, size: int, up: LatentUp, rule: AttentionRule) -> Tensor:
    if up.expanding_pays(len(query)):
        return attend_causal(query, *up.expand(latents[0]), rule)
    return up.values_of(attend_causal(up.absorb(query), latents, latents[..., :size], rule))

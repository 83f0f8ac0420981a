"""The forward pass of a decoder-only transformer on one rank: embedding, layers, logits.

Shapes: T rows (tokens of the step), N of them draw; V rows of the vocabulary on this rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm

from core.kv_layout import KVLayout
from engine.arithmetic import arithmetic_dtype
from engine.attention import AttentionStep
from engine.attention_math import AttentionRule
from engine.model_spec import AttentionSpec, LayerSpec, ModelSpec
from engine.rank_group import RankGroup
from engine.rope import inverse_frequencies, rotary_angles, rotate
from engine.rope_spec import Rope
from engine.step_inputs import StepInputs
from engine.weights import TORCH_DTYPES, AttentionWeights, LatentAttentionWeights, LayerWeights, ModelWeights

Angles = dict[Rope, tuple[Tensor, Tensor]]  # of a step's positions
QueryKeyValue = tuple[Tensor, Tensor, Tensor]  # see AttentionStep


class Decoder:
    """One rank's share of the model. Every layer ends both of its halves with an all-reduce."""

    def __init__(self, spec: ModelSpec, layout: KVLayout, weights: ModelWeights, group: RankGroup) -> None:
        self._spec = spec
        self._decoder = spec.decoder
        self._weights = weights
        self._group = group
        self._num_query_heads = spec.decoder.num_heads // layout.tensor_parallel
        self._num_kv_heads = layout.heads_per_rank
        device, scale = weights.embedding.device, spec.decoder.embedding_scale
        self._arithmetic = arithmetic_dtype(device, weights.embedding.dtype)
        self._cached_dtype = TORCH_DTYPES[layout.dtype]
        self._embedding_scale = (
            None if scale == 1.0 else torch.tensor(scale, dtype=weights.embedding.dtype, device=device)
        )
        ropes = dict.fromkeys(layer.attention.rope for layer in spec.decoder.layers)
        self._frequencies = {rope: inverse_frequencies(rope).to(device) for rope in ropes}
        self._rules = [_rule(layer, own) for layer, own in zip(spec.decoder.layers, weights.layers, strict=True)]

    def forward(self, inputs: StepInputs, attention: AttentionStep, layer_done: Callable[[int], None]) -> Tensor | None:
        """Logits of the rows that draw, [N, vocabulary] in float32, on the first rank; None elsewhere or if N is 0.

        `layer_done(layer)` is called when that layer's KV is written on all ranks (queued, on CUDA).
        """
        hidden = self._embed(inputs.token_ids)
        angles = {
            rope: rotary_angles(inputs.positions, frequencies, rope, hidden.dtype)
            for rope, frequencies in self._frequencies.items()
        }
        for index, layer in enumerate(self._weights.layers):
            attended = self._attend(index, layer.attention, self._norm(hidden, layer.attention_norm), angles, attention)
            hidden = hidden + self._norm_if(attended, layer.attention_norm_after)
            layer_done(index)
            fed = self._group.all_reduce(layer.mlp(self._norm(hidden, layer.mlp_norm)))
            hidden = hidden + self._norm_if(fed, layer.mlp_norm_after)
        if not inputs.draws:
            return None
        drawn = self._norm(hidden.index_select(0, inputs.draw_rows), self._weights.final_norm)
        logits = self._group.gather_columns(self._weights.head(drawn))
        return None if logits is None else self._capped(logits[:, : self._spec.vocab_size].float())

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self._weights.embedding
        if self._group.size == 1:
            rows = embedding(token_ids, table)
        else:
            local = token_ids - self._group.rank * table.shape[0]
            elsewhere = (local < 0) | (local >= table.shape[0])
            rows = embedding(local.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0.0)
            rows = self._group.all_reduce(rows)
        scaled = rows if self._embedding_scale is None else rows * self._embedding_scale
        return scaled.to(self._arithmetic)

    def _attend(
        self,
        index: int,
        weights: AttentionWeights | LatentAttentionWeights,
        x: Tensor,
        angles: Angles,
        attention: AttentionStep,
    ) -> Tensor:
        turned = angles[self._decoder.layers[index].attention.rope]
        if isinstance(weights, LatentAttentionWeights):
            query, key, value = self._latents(weights, x, *turned)
        else:
            query, key, value = self._heads(weights, x, *turned)
        key, value = key.to(self._cached_dtype), value.to(self._cached_dtype)
        attended = attention.attend(index, query, key, value, self._rules[index])
        return self._group.all_reduce(weights.output(attended))

    def _heads(self, weights: AttentionWeights, x: Tensor, cosines: Tensor, sines: Tensor) -> QueryKeyValue:
        num_rotated = self._num_query_heads + self._num_kv_heads
        heads = weights.qkv(x).view(len(x), num_rotated + self._num_kv_heads, self._decoder.head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if weights.query_norm is not None and weights.key_norm is not None:
            queries = self._norm(rotated[:, : self._num_query_heads], weights.query_norm)
            rotated = torch.cat((queries, self._norm(rotated[:, self._num_query_heads :], weights.key_norm)), dim=1)
        rotated = rotate(rotated, cosines, sines)
        return rotated[:, : self._num_query_heads], rotated[:, self._num_query_heads :], value

    def _latents(self, weights: LatentAttentionWeights, x: Tensor, cosines: Tensor, sines: Tensor) -> QueryKeyValue:
        """See LatentAttentionStep."""
        spec, sizes = weights.spec, weights.spec.sizes
        latent, key, query = weights.down(x).tensor_split((sizes.kv_lora_rank, sizes.latent_size), dim=-1)
        if weights.query_norm is not None and weights.query_up is not None:
            query = weights.query_up(rms_norm(query, weights.query_norm.shape, weights.query_norm, spec.norm_eps))
        plain, turning = query.view(len(x), self._num_query_heads, -1).tensor_split((sizes.qk_nope_head_dim,), dim=-1)
        turning = torch.cat((turning, key[:, None]), dim=1)
        turned = rotate(turning, cosines, sines, interleaved=spec.rope.interleaved)
        latent = rms_norm(latent, weights.latent_norm.shape, weights.latent_norm, spec.norm_eps)[:, None]
        query = torch.cat((plain, turned[:, :-1]), dim=-1)
        return query, torch.cat((latent, turned[:, -1:]), dim=-1), latent

    def _norm_if(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._norm(x, weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x.to(weight.dtype), weight.shape, weight, self._decoder.norm_eps).to(x.dtype)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self._decoder.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _rule(layer: LayerSpec, weights: LayerWeights) -> AttentionRule:
    spec, own = layer.attention, weights.attention
    if isinstance(own, LatentAttentionWeights):
        return AttentionRule(spec.scale, up=own.up)
    assert isinstance(spec, AttentionSpec)
    return AttentionRule(spec.scale, spec.window, spec.softcap, own.sinks)

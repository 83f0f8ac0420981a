"""The forward pass of a decoder-only transformer on one rank: embedding, the layers of its stage, logits.

Shapes: T rows (tokens of the step), N of them draw; V rows of the vocabulary on this rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding

from engine.arithmetic import arithmetic_dtype
from engine.attention import AttentionStep
from engine.attention_math import AttentionRule
from engine.kernels import Angles, Kernels, Norm
from engine.model_parameters import Share
from engine.model_spec import AttentionSpec, LayerSpec, ModelSpec
from engine.rank_group import RankGroup
from engine.rope import inverse_frequencies
from engine.weights import TORCH_DTYPES, AttentionWeights, LatentAttentionWeights, LayerWeights, ModelWeights

QueryKeyValue = tuple[Tensor, Tensor, Tensor]  # see AttentionStep


class Decoder:
    """One rank's share of the model. Every layer ends both of its halves with an all-reduce."""

    def __init__(
        self,
        spec: ModelSpec,
        share: Share,
        weights: ModelWeights,
        group: RankGroup,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self._spec = spec
        self._decoder = spec.decoder
        self._weights = weights
        self._group = group
        self._kernels = kernels
        self._num_query_heads = spec.decoder.num_heads // share.layout.tensor_parallel
        self._num_kv_heads = share.layout.heads_per_rank
        dtype, scale = TORCH_DTYPES[spec.dtype], spec.decoder.embedding_scale
        self._device = device
        self._arithmetic = arithmetic_dtype(device, dtype)
        self._embedding_scale = None if scale == 1.0 else torch.tensor(scale, dtype=dtype, device=device)
        self._layers = {index: spec.decoder.layers[index] for index in share.layers}
        ropes = dict.fromkeys(layer.attention.rope for layer in self._layers.values())
        self._frequencies = {rope: inverse_frequencies(rope).to(device) for rope in ropes}
        rules = map(_rule, self._layers.values(), weights.layers)
        self._rules = dict(zip(self._layers, rules, strict=True))

    def forward(
        self, hidden: Tensor, positions: Tensor, attention: AttentionStep, layer_done: Callable[[int], None]
    ) -> Tensor:
        """What the stage's layers make of the rows [T, hidden] that `embed` or the stage before gives, alike in shape.

        `layer_done(layer)` is called when that layer's KV is written on all ranks of the stage (queued, on CUDA).
        """
        kernels, fed = self._kernels, None
        angles = {
            rope: kernels.angles(positions, frequencies, rope, hidden.dtype)
            for rope, frequencies in self._frequencies.items()
        }
        for index, layer in zip(self._layers, self._weights.in_turn(), strict=True):
            if fed is None:
                x = kernels.norm(hidden, layer.attention_norm)
            else:
                hidden, x = kernels.add_norm(hidden, fed, layer.attention_norm)
            turned = angles[self._layers[index].attention.rope]
            attended = self._attend(index, layer.attention, x, turned, attention)
            layer_done(index)
            hidden, x = kernels.add_norm(hidden, self._norm_if(attended, layer.attention_norm_after), layer.mlp_norm)
            fed = self._norm_if(self._group.all_reduce(layer.mlp(x)), layer.mlp_norm_after)
        return hidden if fed is None else hidden + fed

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Of rows [N, hidden] of the last stage: [N, vocabulary] in float32 on its first rank, None elsewhere."""
        assert self._weights.final_norm is not None and self._weights.head is not None
        normed = self._kernels.norm(hidden, self._weights.final_norm)
        logits = self._group.gather_columns(self._weights.head(normed))
        return None if logits is None else self._capped(logits[:, : self._spec.vocab_size].float())

    def room(self, num_rows: int) -> Tensor:
        """For what the stage before gives, [num_rows, hidden]."""
        return torch.empty(num_rows, self._spec.hidden_size, dtype=self._arithmetic, device=self._device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Of token ids [T] on the first stage: [T, hidden]."""
        table = self._weights.embedding
        assert table is not None
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
        if isinstance(weights, LatentAttentionWeights):
            query, key, value = self._latents(weights, x, angles)
        else:
            query, key, value = self._heads(weights, x, angles)
        attended = attention.attend(index, query, key, value, self._rules[index])
        return self._group.all_reduce(weights.output(attended))

    def _heads(self, weights: AttentionWeights, x: Tensor, angles: Angles) -> QueryKeyValue:
        num_rotated = self._num_query_heads + self._num_kv_heads
        heads = weights.qkv(x).view(len(x), num_rotated + self._num_kv_heads, self._decoder.head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if weights.query_norm is not None and weights.key_norm is not None:
            queries = self._kernels.norm(rotated[:, : self._num_query_heads], weights.query_norm)
            keys = self._kernels.norm(rotated[:, self._num_query_heads :], weights.key_norm)
            rotated = torch.cat((queries, keys), dim=1)
        rotated = self._kernels.rotate(rotated, angles, interleaved=False)
        return rotated[:, : self._num_query_heads], rotated[:, self._num_query_heads :], value

    def _latents(self, weights: LatentAttentionWeights, x: Tensor, angles: Angles) -> QueryKeyValue:
        """See LatentAttentionStep."""
        sizes = weights.spec.sizes
        latent, key, query = weights.down(x).tensor_split((sizes.kv_lora_rank, sizes.latent_size), dim=-1)
        if weights.query_norm is not None and weights.query_up is not None:
            query = weights.query_up(self._kernels.norm(query, weights.query_norm))
        plain, turning = query.view(len(x), self._num_query_heads, -1).tensor_split((sizes.qk_nope_head_dim,), dim=-1)
        turning = torch.cat((turning, key[:, None]), dim=1)
        turned = self._kernels.rotate(turning, angles, interleaved=weights.spec.rope.interleaved)
        latent = self._kernels.norm(latent, weights.latent_norm)[:, None]
        query = torch.cat((plain, turned[:, :-1]), dim=-1)
        return query, torch.cat((latent, turned[:, -1:]), dim=-1), latent

    def _norm_if(self, x: Tensor, norm: Norm | None) -> Tensor:
        return x if norm is None else self._kernels.norm(x, norm)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self._decoder.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _rule(layer: LayerSpec, weights: LayerWeights) -> AttentionRule:
    spec, own = layer.attention, weights.attention
    if isinstance(own, LatentAttentionWeights):
        return AttentionRule(spec.scale, up=own.up)
    assert isinstance(spec, AttentionSpec)
    return AttentionRule(spec.scale, spec.window, spec.softcap, own.sinks)

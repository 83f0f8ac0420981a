"""The forward pass of a decoder-only transformer on one rank: embedding, blocks, logits.

Shapes: T rows (tokens of the step), N of them draw; V rows of the vocabulary on this rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from core.kv_layout import KVLayout
from engine.attention import AttentionStep
from engine.checkpoint import ModelSpec
from engine.rank_group import RankGroup
from engine.rope import inverse_frequencies, rotary_angles, rotate
from engine.step_inputs import StepInputs
from engine.weights import BlockWeights, ModelWeights


class Decoder:
    """One rank's share of the model. Every block ends both of its halves with an all-reduce."""

    def __init__(self, spec: ModelSpec, layout: KVLayout, weights: ModelWeights, group: RankGroup) -> None:
        self._spec = spec
        self._weights = weights
        self._group = group
        self._num_query_heads = spec.num_heads // layout.tensor_parallel
        self._num_kv_heads = layout.heads_per_rank
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(weights.embedding.device)

    def forward(self, inputs: StepInputs, attention: AttentionStep, layer_done: Callable[[int], None]) -> Tensor | None:
        """Logits of the rows that draw, [N, vocabulary] in float32, on the first rank; None elsewhere or if N is 0.

        `layer_done(layer)` is called when that layer's KV is written on all ranks (queued, on CUDA).
        """
        hidden = self._embed(inputs.token_ids)
        angles = rotary_angles(inputs.positions, self._frequencies, hidden.dtype)
        for layer, block in enumerate(self._weights.blocks):
            hidden = hidden + self._attend(layer, block, self._norm(hidden, block.input_norm), angles, attention)
            layer_done(layer)
            hidden = hidden + self._feed_forward(block, self._norm(hidden, block.mlp_norm))
        if not inputs.draws:
            return None
        drawn = self._norm(hidden.index_select(0, inputs.draw_rows), self._weights.final_norm)
        logits = self._group.gather_columns(self._weights.head(drawn))
        return None if logits is None else logits[:, : self._spec.vocab_size].float()

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self._weights.embedding
        if self._group.size == 1:
            return embedding(token_ids, table)
        local = token_ids - self._group.rank * table.shape[0]
        elsewhere = (local < 0) | (local >= table.shape[0])
        rows = embedding(local.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0.0)
        return self._group.all_reduce(rows)

    def _attend(
        self, layer: int, block: BlockWeights, x: Tensor, angles: tuple[Tensor, Tensor], attention: AttentionStep
    ) -> Tensor:
        num_rotated = self._num_query_heads + self._num_kv_heads
        heads = block.qkv(x).view(len(x), num_rotated + self._num_kv_heads, self._spec.head_dim)
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if block.query_norm is not None and block.key_norm is not None:
            queries = self._norm(rotated[:, : self._num_query_heads], block.query_norm)
            rotated = torch.cat((queries, self._norm(rotated[:, self._num_query_heads :], block.key_norm)), dim=1)
        rotated = rotate(rotated, *angles)
        query, key = rotated[:, : self._num_query_heads], rotated[:, self._num_query_heads :]
        return self._group.all_reduce(block.output(attention.attend(layer, query, key, value)))

    def _feed_forward(self, block: BlockWeights, x: Tensor) -> Tensor:
        gate, up = block.gate_up(x).chunk(2, dim=-1)
        return self._group.all_reduce(block.down(silu(gate) * up))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self._spec.rms_norm_eps)

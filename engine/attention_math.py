"""Softmax attention over contiguous keys and values, with the queries of a KV head taken together.

Shapes: n sequences, R rows (queries) of one sequence, Q query heads, H KV heads, G = Q / H, C context, D head size.
Scores and weights are stored in the model's dtype; products and softmax accumulate in float32. On a CPU without matrix
units this is 3 to 7 times faster than scaled_dot_product_attention for one query per sequence, and 1.2 to 1.8 times for
a causal chunk.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.arithmetic import arithmetic_dtype

_ROWS_PER_PRODUCT = 128  # of a chunk: its scores stay in cache, and half of the square above the diagonal is skipped


def attend_single(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """One query per sequence, [n, Q, D], over keys and values [n, H, C, D]: [n, Q * D].

    `hidden` [n, 1, 1, C] marks what lies beyond a sequence's context.
    """
    dtype, query, keys, values = _in_arithmetic(query, keys, values)
    scaled = query * query.shape[-1] ** -0.5
    grouped = scaled.view(len(query), keys.shape[1], -1, query.shape[-1])  # [n, H, G, D]
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).masked_fill_(hidden, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), values).view(len(query), -1).to(dtype)


def attend_causal(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last R of C positions, [R, Q, D], each over itself and what precedes it in [H, C, D]: [R, Q * D]."""
    if query.device.type == "cuda":
        return _attend_causal_fused(query, keys, values)
    dtype, query, keys, values = _in_arithmetic(query, keys, values)
    rows, num_heads, head_dim = len(query), keys.shape[0], query.shape[-1]
    first = keys.shape[1] - rows
    scaled = query * head_dim**-0.5
    grouped = scaled.view(rows, num_heads, -1, head_dim).permute(1, 2, 0, 3)  # [H, G, R, D]
    columns = keys.transpose(1, 2).contiguous()[:, None]  # [H, 1, D, C]
    values = values.contiguous()[:, None]
    parts = []
    for start in range(0, rows, _ROWS_PER_PRODUCT):
        end = min(start + _ROWS_PER_PRODUCT, rows)
        context = first + end
        scores = torch.matmul(grouped[:, :, start:end], columns[..., :context])
        above = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
        scores[..., first + start :].masked_fill_(above, float("-inf"))
        parts.append(torch.matmul(scores.softmax(dim=-1), values[:, :, :context]))  # [H, G, rows, D]
    attended = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return attended.permute(2, 0, 1, 3).reshape(rows, -1).to(dtype)


def _in_arithmetic(query: Tensor, keys: Tensor, values: Tensor) -> tuple[torch.dtype, Tensor, Tensor, Tensor]:
    """The model's dtype, and all three in the one that they are multiplied in."""
    wide = arithmetic_dtype(query.device, query.dtype)
    return query.dtype, query.to(wide), keys.to(wide), values.to(wide)


def _attend_causal_fused(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    rows, context = len(query), keys.shape[1]
    whole = rows == context
    mask = None if whole else torch.ones(rows, context, dtype=torch.bool, device=query.device).tril_(context - rows)
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=whole, enable_gqa=True
    )
    return attended[0].transpose(0, 1).reshape(rows, -1)

"""MXFP4: blocks of 32 weights of 4 bits and one scale (OCP Microscaling Formats specification 1.0, 2023).

Shapes: R rows, B blocks of a row.
"""

import torch
from torch import Tensor

BLOCK_WEIGHTS = 32
BLOCK_BYTES = BLOCK_WEIGHTS // 2

_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_WEIGHTS = torch.cat((_MAGNITUDES, -_MAGNITUDES)).bfloat16()  # by their 4 bits
_PAIRS = torch.stack((_WEIGHTS.repeat(16), _WEIGHTS.repeat_interleave(16)), dim=1)  # by a byte, its low bits first
_PAIRS_AS_INTS = _PAIRS.view(torch.int32).flatten()
_POWERS = torch.cat((torch.pow(2.0, torch.arange(-127, 128)), torch.tensor([torch.nan]))).bfloat16()  # by a scale


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """Bytes of blocks [R, B, 16] and of scales [R, B]: weights [R, 32 B] in bfloat16, which holds them exactly."""
    pairs = _PAIRS_AS_INTS.index_select(0, blocks.flatten().int())
    weights = pairs.view(torch.bfloat16).view(*scales.shape, BLOCK_WEIGHTS)
    return weights.mul_(_POWERS[scales.int()][..., None]).flatten(1)

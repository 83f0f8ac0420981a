"""Multi-head latent attention (DeepSeek-AI, "DeepSeek-V2", 2024): between latents and the heads of one rank.

The latent of a token is what its keys and values are made of, L elements, then a rotated key part that all heads share,
R elements. The scores of a query against keys made of latents are those of the query, brought down, against the latents
themselves; and values may be made of latents before they are weighed or after:

    absorbed   scores = (query keys) latent         output = values (weights latents)      nothing is made per position
    expanded   scores = query (keys latent)         output = weights (values latents)      shorter products per query

Shapes: T rows, C positions, H query heads of the rank, N elements of a head's key that are not rotated, V of its value.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.arithmetic import arithmetic_dtype


@dataclass(frozen=True)
class LatentUp:
    """The matrices that make keys and values of latents."""

    weight: Tensor  # [H, N + V, L]
    key_size: int  # N

    def expanding_pays(self, num_rows: int) -> bool:
        """Whether so many queries of one context are computed faster over keys and values made for them: the products
        per position and head, those of making them included, are fewer.
        """
        made, size = self.weight.shape[1:]
        return num_rows * made + made * size < num_rows * 2 * size

    def absorb(self, query: Tensor) -> Tensor:
        """Queries [T, H, N + R], brought down to the latents' space: [T, H, L + R]."""
        plain, rotated = query.tensor_split((self.key_size,), dim=-1)
        down = _multiply(plain.transpose(0, 1), self.weight[:, : self.key_size])
        return torch.cat((down.transpose(0, 1), rotated), dim=-1)

    def values_of(self, weighed: Tensor) -> Tensor:
        """Of weighed latents [T, H * L]: [T, H * V]."""
        heads = weighed.view(len(weighed), len(self.weight), -1).transpose(0, 1)
        return _multiply(heads, self.weight[:, self.key_size :].transpose(1, 2)).transpose(0, 1).flatten(1)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, C, N + R] and values [H, C, V] of latents [C, L + R]."""
        plain, rotated = latents.tensor_split((self.weight.shape[-1],), dim=-1)
        made = _multiply(plain, self.weight.flatten(0, 1).t()).view(len(plain), *self.weight.shape[:2]).transpose(0, 1)
        keys, values = made.tensor_split((self.key_size,), dim=-1)
        return torch.cat((keys, rotated.expand(len(keys), -1, -1)), dim=-1), values


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    wide = arithmetic_dtype(a.device, a.dtype)
    return torch.matmul(a.to(wide), b.to(wide)).to(a.dtype)

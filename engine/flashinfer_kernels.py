"""Norms, rotations and activations by FlashInfer, in half precision on CUDA; what it has not got, torch computes."""

from typing import Any

import torch
from torch import Tensor

from engine.kernels import Angles, Norm, TorchKernels
from engine.model_spec import Activation
from engine.rope import pair_angles
from engine.rope_spec import Rope


class FlashInferKernels:
    """Kernels."""

    def __init__(self, library: Any) -> None:
        """`library`: the module flashinfer."""
        self._library = library
        self._torch = TorchKernels()

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See Kernels. A norm with an offset takes rows alone, so heads are laid out as such."""
        if not norm.has_offset:
            normed: Tensor = self._library.rmsnorm(x, norm.stored, norm.eps)
            return normed
        rows: Tensor = self._library.gemma_rmsnorm(x.reshape(-1, x.shape[-1]), norm.stored, norm.eps)
        return rows.view(x.shape)

    def add_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """See Kernels. Both lie where the arguments lay."""
        add_norm = self._library.gemma_fused_add_rmsnorm if norm.has_offset else self._library.fused_add_rmsnorm
        add_norm(x, residual, norm.stored, norm.eps)
        return residual, x

    def angles(self, positions: Tensor, frequencies: Tensor, rope: Rope, dtype: torch.dtype) -> Angles:  # noqa: ARG002
        """A table of one line per row, and the lines' numbers, so that every rule of scaling is ours."""
        lines = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        return lines, torch.cat(pair_angles(positions, frequencies, rope), dim=-1)

    def rotate(self, heads: Tensor, angles: Angles, *, interleaved: bool) -> Tensor:
        """See Kernels. In place; the library wants two tensors of heads, and treats them alike."""
        lines, table = angles
        most, last = heads[:, :-1].flatten(1), heads[:, -1]
        self._library.apply_rope_with_cos_sin_cache_inplace(
            lines, most, last, heads.shape[-1], table, is_neox=not interleaved
        )
        return heads

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See Kernels."""
        match activation:
            case "silu":
                activated: Tensor = self._library.silu_and_mul(gate_up)
            case "gelu_tanh":
                activated = self._library.gelu_tanh_and_mul(gate_up)
            case _:
                activated = self._torch.activate(gate_up, activation)
        return activated

"""What a decoder computes beside products and attention, on a CPU in float32: one compiled call each."""

import torch
from torch import Tensor

from engine.cpu_library import CpuLibrary
from engine.kernels import Angles, Norm, TorchKernels
from engine.model_spec import Activation


class CpuKernels(TorchKernels):
    """See Kernels. What is not compiled, torch computes."""

    def __init__(self, library: CpuLibrary) -> None:
        """Threads are as many as torch has when this is made."""
        self._library = library
        self._num_threads = torch.get_num_threads()

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See Kernels."""
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._library.norm(
            x.data_ptr(),
            norm.weight.data_ptr(),
            x.numel() // size,
            size,
            norm.eps,
            out.data_ptr(),
            self._num_threads,
        )
        return out

    def add_norm(self, residual: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """See Kernels. The sum lies where the residual lay."""
        x = x.contiguous()
        out = torch.empty_like(x)
        at = residual.data_ptr()
        self._library.add_norm(
            at,
            x.data_ptr(),
            norm.weight.data_ptr(),
            *x.shape,
            norm.eps,
            at,
            out.data_ptr(),
            self._num_threads,
        )
        return residual, out

    def rotate(self, heads: Tensor, angles: Angles, *, interleaved: bool) -> Tensor:
        """See Kernels. In place where the elements of a head lie together."""
        if interleaved or heads.stride()[1:] != (heads.shape[2], 1):
            return super().rotate(heads, angles, interleaved=interleaved)
        cosines, sines = angles
        self._library.rotate(
            heads.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            len(heads),
            heads.stride(0),
            heads.shape[1],
            heads.shape[2],
            cosines.shape[-1],
            self._num_threads,
        )
        return heads

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See Kernels."""
        if activation != "silu":
            return super().activate(gate_up, activation)
        rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, inner)
        self._library.silu_mul(gate_up.data_ptr(), rows, inner, out.data_ptr(), self._num_threads)
        return out

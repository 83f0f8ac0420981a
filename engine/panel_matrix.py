"""A bfloat16 matrix that compiled code multiplies with rows of float32: see cpu_products.cpp, cpu_pair_products.cpp."""

import torch
from torch import Tensor

from engine.cpu_library import CpuLibrary


class PanelMatrix:
    """W [outputs, inputs] of bfloat16, to be multiplied with rows of float32; a Matrix."""

    def __init__(self, library: CpuLibrary, weight: Tensor, bias: Tensor | None) -> None:
        """A bias is in float32. The weight is not kept. Threads are as many as torch has when this is made."""
        assert weight.dtype == torch.bfloat16
        self._library, self._bias = library, bias
        self._num_outputs, self._num_inputs = weight.shape
        self._num_threads = torch.get_num_threads()
        num_padded = -(-self._num_outputs // library.panel_outputs) * library.panel_outputs
        self._panels = torch.empty(num_padded, self._num_inputs + self._num_inputs % 2, dtype=torch.bfloat16)
        rows = weight.contiguous()
        library.pack(rows.data_ptr(), *rows.shape, self._panels.data_ptr(), self._num_threads)

    def multiply(self, x: Tensor) -> Tensor:
        """See Matrix."""
        x = x.contiguous()
        product = x.new_empty(len(x), self._num_outputs)
        self._library.multiply(
            x.data_ptr(),
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            len(x),
            self._num_inputs,
            self._num_outputs,
            product.data_ptr(),
            self._num_threads,
        )
        return product

    def rows(self) -> Tensor:
        """See Matrix."""
        rows = torch.empty(self._num_outputs, self._num_inputs, dtype=torch.bfloat16)
        self._library.unpack(self._panels.data_ptr(), *rows.shape, rows.data_ptr(), self._num_threads)
        return rows

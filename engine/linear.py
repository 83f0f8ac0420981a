"""A linear layer."""

from torch import Tensor

from engine.matrix import matrix_of, plain_matrix


class Linear:
    """y = x W^T + b for a weight [outputs, inputs], which may be repacked: the weight passed in is then not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, may_pack: bool = True) -> None:
        self.bias = bias
        self._matrix = matrix_of(weight, bias) if may_pack else plain_matrix(weight, bias)
        self.rows = self._matrix.rows
        self._multiply = self._matrix.multiply

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, inputs] -> [rows, outputs]."""
        return self._multiply(x)

"""How parts of parameters are read off stored tensors, by the encoding of those."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from core.errors import ConfigurationError
from engine.mxfp4 import BLOCK_BYTES, BLOCK_WEIGHTS, dequantise
from engine.parameters import Part

OpenSlice = Callable[[str], Any]  # a stored tensor by its name, to be sliced; raises ConfigurationError when absent
Decode = Callable[[Part, OpenSlice], Tensor]


def read_plain(part: Part, open_slice: OpenSlice) -> Tensor:
    """As it is stored. Raises ConfigurationError naming a misshapen tensor, as all do."""
    return _take(part, open_slice, "", part.shape, part.rows, part.columns)


def read_transposed(part: Part, open_slice: OpenSlice) -> Tensor:
    """Of a matrix that is stored as [inputs, outputs]; torch copies the transpose of what is contiguous in tiles."""
    return _take(part, open_slice, "", part.shape[::-1], part.columns, part.rows).contiguous().T


def read_mxfp4(part: Part, open_slice: OpenSlice) -> Tensor:
    """Only the blocks that hold some of the part's columns are read and decoded."""
    outputs, inputs = part.shape
    columns = part.columns or range(inputs)
    taken = range(columns.start // BLOCK_WEIGHTS, _num_blocks(columns.stop))
    shape = (outputs, _num_blocks(inputs))
    blocks = _take(part, open_slice, "_blocks", (*shape, BLOCK_BYTES), part.rows, taken)
    scales = _take(part, open_slice, "_scales", shape, part.rows, taken)
    first = columns.start - taken.start * BLOCK_WEIGHTS
    return dequantise(blocks, scales)[:, first : first + len(columns)]


def _take(part: Part, open_slice: OpenSlice, suffix: str, shape: tuple[int, ...], *ranges: range) -> Tensor:
    """Ranges of a matrix or vector that must have that shape; of the part's expert, where the tensor holds several."""
    name, expected = part.name + suffix, (part.num_experts, *shape) if part.num_experts else shape
    stored = open_slice(name)
    if tuple(stored.get_shape()) != expected:
        raise ConfigurationError(f"tensor {name!r} has shape {tuple(stored.get_shape())}, the config asks {expected}")
    if suffix and stored.get_dtype() != "U8":
        raise ConfigurationError(f"tensor {name!r} holds {stored.get_dtype()}, not the bytes (U8) of MXFP4")
    slices = [slice(taken.start, taken.stop, taken.step) if taken else slice(None) for taken in ranges[: len(shape)]]
    return stored[(part.expert, *slices) if part.num_experts else tuple(slices)]  # type: ignore[no-any-return]


def _num_blocks(weights: int) -> int:
    return -(-weights // BLOCK_WEIGHTS)


DECODERS: dict[str, Decode] = {"plain": read_plain, "transposed": read_transposed, "mxfp4": read_mxfp4}

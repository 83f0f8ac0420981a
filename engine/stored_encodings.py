"""How parts of parameters are read off stored tensors, by the encoding of those."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from core.errors import ConfigurationError
from engine.mxfp4 import BLOCK_BYTES, BLOCK_WEIGHTS, dequantise
from engine.parameters import Part

OpenSlice = Callable[[str], Any]  # a stored tensor by its name, to be sliced; raises ConfigurationError when absent
Decode = Callable[[Part, OpenSlice], Tensor]

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8_BLOCK = 128  # rows, and columns


def read_plain(part: Part, open_slice: OpenSlice) -> Tensor:
    """As it is stored. Raises ConfigurationError naming a misshapen tensor, as all do, or one that holds no floats: of
    quantised weights whose config does not say so, the scales would be missed.
    """
    if (dtype := open_slice(part.name).get_dtype()) not in _FLOATS:
        raise ConfigurationError(
            f"tensor {part.name!r} holds {dtype}; without a quantization_config it must hold floats"
        )
    return _as_stored(part, open_slice)


def _as_stored(part: Part, open_slice: OpenSlice) -> Tensor:
    return _take(part, open_slice, "", part.shape, part.rows, part.columns)


def read_fp8_blocks(part: Part, open_slice: OpenSlice) -> Tensor:
    """A matrix in FP8, in float32: blocks of 128 rows and columns, each times its own factor, which lies at the name
    with `_scale_inv` behind it. Matrices that were left out of the quantisation are read as they are.

    Raises ConfigurationError naming a missing or misshapen tensor.
    """
    if open_slice(part.name).get_dtype() != "F8_E4M3":
        return read_plain(part, open_slice)
    whole_rows, whole_columns = (range(size) for size in part.shape)
    rows, columns = part.rows or whole_rows, part.columns or whole_columns
    scales = Part(
        f"{part.name}_scale_inv",
        (-(-part.shape[0] // _FP8_BLOCK), -(-part.shape[1] // _FP8_BLOCK)),
        _blocks_around(rows, _FP8_BLOCK),
        _blocks_around(columns, _FP8_BLOCK),
    )
    factors = read_plain(scales, open_slice).float().repeat_interleave(_FP8_BLOCK, dim=1)
    skipped = columns.start % _FP8_BLOCK
    factors = factors[:, skipped : skipped + len(columns)]
    matrix = _as_stored(part, open_slice).float()
    for block, factor in zip(scales.rows, factors, strict=True):  # a factor per element would take as much memory again
        start, stop = block * _FP8_BLOCK - rows.start, (block + 1) * _FP8_BLOCK - rows.start
        matrix[max(start, 0) : stop] *= factor
    return matrix


def read_transposed(part: Part, open_slice: OpenSlice) -> Tensor:
    """Of a matrix that is stored as [inputs, outputs]; torch copies the transpose of what is contiguous in tiles."""
    return _take(part, open_slice, "", part.shape[::-1], part.columns, part.rows).contiguous().T


def read_mxfp4(part: Part, open_slice: OpenSlice) -> Tensor:
    """Only the blocks that hold some of the part's columns are read and decoded."""
    outputs, inputs = part.shape
    columns = part.columns or range(inputs)
    taken = _blocks_around(columns, BLOCK_WEIGHTS)
    shape = (outputs, -(-inputs // BLOCK_WEIGHTS))
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


def _blocks_around(elements: range, block_size: int) -> range:
    """The blocks that hold some of the elements."""
    return range(elements.start // block_size, -(-elements.stop // block_size))


DECODERS: dict[str, Decode] = {
    "plain": read_plain,
    "transposed": read_transposed,
    "fp8_blocks": read_fp8_blocks,
    "mxfp4": read_mxfp4,
}

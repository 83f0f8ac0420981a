"""How parts of parameters are read off stored tensors, by the encoding of those."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from core.errors import ConfigurationError
from engine.parameters import Part

OpenSlice = Callable[[str], Any]  # a stored tensor by its name, to be sliced; raises ConfigurationError when absent
Decode = Callable[[Part, OpenSlice], Tensor]

_FP8_BLOCK = 128  # rows, and columns


def read_plain(part: Part, open_slice: OpenSlice) -> Tensor:
    """As it is stored. Raises ConfigurationError naming a misshapen tensor."""
    stored = open_slice(part.name)
    if tuple(stored.get_shape()) != part.shape:
        raise ConfigurationError(
            f"tensor {part.name!r} has shape {tuple(stored.get_shape())}, the config asks {part.shape}"
        )
    rows = slice(part.rows.start, part.rows.stop) if part.rows else slice(None)
    columns = (slice(part.columns.start, part.columns.stop),) if part.columns else ()
    return stored[(rows, *columns)]  # type: ignore[no-any-return]


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
        _fp8_blocks_of(rows),
        _fp8_blocks_of(columns),
    )
    factors = read_plain(scales, open_slice).float().repeat_interleave(_FP8_BLOCK, dim=1)
    skipped = columns.start % _FP8_BLOCK
    factors = factors[:, skipped : skipped + len(columns)]
    matrix = read_plain(part, open_slice).float()
    for block, factor in zip(scales.rows, factors, strict=True):  # a factor per element would take as much memory again
        start, stop = block * _FP8_BLOCK - rows.start, (block + 1) * _FP8_BLOCK - rows.start
        matrix[max(start, 0) : stop] *= factor
    return matrix


def _fp8_blocks_of(elements: range) -> range:
    return range(elements.start // _FP8_BLOCK, -(-elements.stop // _FP8_BLOCK))


DECODERS: dict[str, Decode] = {"plain": read_plain, "fp8_blocks": read_fp8_blocks}

"""How parts of parameters are read off stored tensors, by the encoding of those."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from core.errors import ConfigurationError
from engine.parameters import Part

OpenSlice = Callable[[str], Any]  # a stored tensor by its name, to be sliced; raises ConfigurationError when absent
Decode = Callable[[Part, OpenSlice], Tensor]


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


DECODERS: dict[str, Decode] = {"plain": read_plain}

"""Block keys one after another in plain bytes, which the garbage collector never walks through. Pure."""

from collections.abc import Iterator, Sequence

from core.block_hash import BlockKey


class KeyLog:
    """Grows at its end alone; a list of ten million keys would cost every full collection a quarter of a second."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: dict[int, bytearray] = {}  # by the length of their keys: those of one KV group are equally long

    def __len__(self) -> int:
        return sum(len(part) // size for size, part in self._parts.items())

    def __iter__(self) -> Iterator[BlockKey]:
        for size, part in self._parts.items():
            whole = bytes(part)
            yield from (whole[start : start + size] for start in range(0, len(whole), size))

    def add(self, keys: Sequence[BlockKey]) -> None:
        """At the end."""
        sizes = set(map(len, keys))
        for size in sizes:
            part = self._parts.setdefault(size, bytearray())
            part += b"".join(keys if len(sizes) == 1 else [key for key in keys if len(key) == size])

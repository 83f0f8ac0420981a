"""An object and its tensors apart, so that the same object can be made again over other tensors.

Pickle's persistent ids stand for the tensors, so that no class has to know how it is taken apart.
"""

import io
import pickle
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Generic, TypeVar

from torch import Tensor

Whole = TypeVar("Whole")


def take_apart(whole: Whole) -> tuple["Skeleton[Whole]", list[Tensor]]:
    """What is left without tensors, and those, each once."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(whole)
    return Skeleton(stream.getvalue(), pickler.modules), pickler.tensors


class Skeleton(Generic[Whole]):
    """See take_apart."""

    def __init__(self, pickled: bytes, modules: Sequence[ModuleType]) -> None:
        self._pickled = pickled
        self._modules = modules

    def over(self, tensors: Sequence[Tensor]) -> Whole:
        """The object once more, with these in place of its own."""
        whole: Whole = _Unpickler(io.BytesIO(self._pickled), tensors, self._modules).load()
        return whole


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: list[Tensor] = []
        self.modules: list[ModuleType] = []
        self._numbers: dict[int, int] = {}  # by id, of objects that are kept alive above

    def persistent_id(self, thing: Any) -> tuple[str, int] | None:
        if isinstance(thing, Tensor):
            return "tensor", self._number(thing, self.tensors)
        if isinstance(thing, ModuleType):
            return "module", self._number(thing, self.modules)
        return None

    def _number(self, thing: Any, kept: list[Any]) -> int:
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(kept)
            kept.append(thing)
        return self._numbers[id(thing)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: Sequence[Tensor], modules: Sequence[ModuleType]) -> None:
        super().__init__(stream)
        self._kept: dict[str, Sequence[Any]] = {"tensor": tensors, "module": modules}

    def persistent_load(self, pid: tuple[str, int]) -> Any:
        kind, number = pid
        return self._kept[kind][number]

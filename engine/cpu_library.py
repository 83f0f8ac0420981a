"""What a CPU computes faster by code of our own: the C++ sources beside this file, compiled once per machine."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from core.compiled_library import compiled_library

_NAMES = ("cpu_kernels.cpp", "cpu_products.cpp", "cpu_pair_products.cpp", "cpu_pair_attention.cpp")
_HEADERS = ("cpu_attention.h", "cpu_pairs.h")
SOURCES, HEADERS = (tuple(Path(__file__).with_name(name) for name in names) for names in (_NAMES, _HEADERS))
COMPILE = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-fopenmp", "-fPIC")
LINK = ()  # without -fopenmp: torch has loaded an OpenMP; without -ffast-math: that would change the process

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = {
    "norm": (_POINTER, _POINTER, _LONG, _LONG, _FLOAT, _POINTER, _INT),
    "add_norm": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _POINTER, _POINTER, _INT),
    "silu_mul": (_POINTER, _LONG, _LONG, _POINTER, _INT),
    "rotate": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG, _INT),
    "write": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _INT, _INT),
    "attend": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT),
    "pack": (_POINTER, _LONG, _LONG, _POINTER, _INT),
    "unpack": (_POINTER, _LONG, _LONG, _POINTER, _INT),
    "multiply": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT),
}
_OF_CHUNK = (_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT)

Function = Callable[..., None]


@dataclass(frozen=True)
class CpuLibrary:
    """The functions of the sources, where their names begin with `baton_`."""

    norm: Function
    add_norm: Function
    silu_mul: Function
    rotate: Function
    write: Function
    attend: Function
    pack: Function
    unpack: Function
    multiply: Function
    panel_outputs: int
    attend_chunk: Function | None  # where products take rows in bfloat16, by the processor's own instructions

    @property
    def multiplies_pairs(self) -> bool:
        """Whether they do."""
        return self.attend_chunk is not None


@cache
def load_cpu_library() -> CpuLibrary | None:
    """None, with the reason logged, where it cannot be made."""
    library = compiled_library("cpu_kernels", SOURCES, COMPILE, LINK, HEADERS, torch.__version__)
    if library is None:
        return None
    functions = {name: _function(library, name, types) for name, types in _ARGUMENTS.items()}
    attend_chunk = _function(library, "attend_chunk", _OF_CHUNK) if library.baton_multiplies_pairs() else None
    return CpuLibrary(**functions, panel_outputs=library.baton_panel_outputs(), attend_chunk=attend_chunk)


def _function(library: ctypes.CDLL, name: str, types: Sequence[type]) -> Function:
    function = library[f"baton_{name}"]
    function.argtypes, function.restype = types, None
    return function

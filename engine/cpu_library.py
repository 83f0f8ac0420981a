"""Compiles the C++ sources beside it once per machine, and loads them.

Takes three seconds the first time, and a C++ compiler. The library lies in the user's cache folder under a name made of
sources, flags, compiler and processor.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_NAMES = ("cpu_kernels.cpp", "cpu_products.cpp", "cpu_pair_products.cpp", "cpu_pair_attention.cpp")
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("cpu_attention.h", "cpu_pairs.h"))
FOLDER = Path("~/.cache/baton")
COMPILE = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared",)  # without -fopenmp: torch has loaded an OpenMP; without -ffast-math: that would change the process
_TIMEOUT_S = 120

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
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        logger.info("no C++ compiler: what lies between products is computed by torch")
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("kernels for this CPU could not be compiled, torch computes in their place: %s", error)
        return None
    functions = {name: _function(library, name, types) for name, types in _ARGUMENTS.items()}
    attend_chunk = _function(library, "attend_chunk", _OF_CHUNK) if library.baton_multiplies_pairs() else None
    return CpuLibrary(**functions, panel_outputs=library.baton_panel_outputs(), attend_chunk=attend_chunk)


def _function(library: ctypes.CDLL, name: str, types: Sequence[type]) -> Function:
    function = library[f"baton_{name}"]
    function.argtypes, function.restype = types, None
    return function


def _built(compiler: str) -> Path:
    """Raises OSError, RuntimeError without a home, subprocess.SubprocessError."""
    told = subprocess.run((compiler, "--version"), capture_output=True, check=True, timeout=_TIMEOUT_S).stdout
    sources = b"".join(source.read_bytes() for source in (*HEADERS, *SOURCES))
    parts = (sources, repr((COMPILE, LINK)).encode(), told, torch.__version__.encode(), _processor())
    library = FOLDER.expanduser() / f"cpu_kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            linked = Path(folder, "kernels.so")
            for command in (
                (*COMPILE, *map(str, SOURCES)),
                (*LINK, *(f"{s.stem}.o" for s in SOURCES), "-o", str(linked)),
            ):
                subprocess.run((compiler, *command), cwd=folder, capture_output=True, check=True, timeout=_TIMEOUT_S)
            linked.replace(library)
    return library


def _processor() -> bytes:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    told = [line for line in lines if line.startswith((b"model name", b"flags", b"Features"))]
    return platform.machine().encode() + b"".join(told[:2])

"""Copies of large slabs past the caches, by stream_copy.cpp where it can be compiled: faster than memcpy."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

from core.compiled_library import compiled_library
from kv_transfer.runs import Starts

LEAST_BYTES = 2**20  # below, a copy fits the caches and is read from there
_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p

StreamRuns = Callable[[int, Starts, int, Starts, int], None]


@cache
def load_stream_copy() -> StreamRuns | None:
    """(address of the destination, where its runs begin, the same of the source, bytes of a run); without the GIL.

    Runs must not overlap. None, with the reason logged, where it cannot be made or the processor knows no such writes.
    """
    library = compiled_library(
        "stream_copy", (Path(__file__).with_name("stream_copy.cpp"),), ("-O3", "-std=c++17", "-fPIC"), ()
    )
    if library is None or not library.baton_can_stream():
        return None
    function = library.baton_stream_runs
    function.argtypes, function.restype = (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG), None

    def stream_runs(to: int, to_starts: Starts, source: int, from_starts: Starts, run_bytes: int) -> None:
        function(to, to_starts.ctypes.data, source, from_starts.ctypes.data, len(to_starts), run_bytes)

    return stream_runs

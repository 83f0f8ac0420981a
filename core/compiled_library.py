"""Compiles C++ sources once per machine and loads what came of them.

Takes a C++ compiler and some seconds the first time. A library lies in the user's cache folder under a name made of
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
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER = Path("~/.cache/baton")
_TIMEOUT_S = 120


def compiled_library(
    name: str,
    sources: Sequence[Path],
    compile_flags: Sequence[str],
    link_flags: Sequence[str],
    headers: Sequence[Path] = (),
    depends_on: str = "",
) -> ctypes.CDLL | None:
    """None, with the reason logged, where it cannot be made.

    `headers` are what the sources include, `depends_on` whatever else the library is not to outlive.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        log.info("no C++ compiler for %s: slower code takes its place", name)
        return None
    commands = (
        (compiler, *compile_flags, "-c", *map(str, sources)),
        (compiler, "-shared", *link_flags, *(f"{source.stem}.o" for source in sources), "-o", "linked.so"),
    )
    try:
        return ctypes.CDLL(str(_built(name, (*headers, *sources), commands, depends_on)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("%s could not be compiled, slower code takes its place: %s", name, error)
        return None


def _built(name: str, code: Sequence[Path], commands: Sequence[Sequence[str]], depends_on: str) -> Path:
    """Raises OSError, RuntimeError without a home, subprocess.SubprocessError."""
    version = (commands[0][0], "--version")
    told = subprocess.run(version, capture_output=True, check=True, timeout=_TIMEOUT_S).stdout
    text = b"".join(file.read_bytes() for file in code)
    parts = (text, repr([command[1:] for command in commands]).encode(), told, depends_on.encode(), _processor())
    library = FOLDER.expanduser() / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            for command in commands:
                subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=_TIMEOUT_S)
            Path(folder, "linked.so").replace(library)
    return library


def _processor() -> bytes:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    told = [line for line in lines if line.startswith((b"model name", b"flags", b"Features"))]
    return platform.machine().encode() + b"".join(told[:2])

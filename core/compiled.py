"""Where machine code of the modules that decide lies, once `cluster.compiled` has made it, and how it is imported.

    PACKAGES --sha256--> ~/.cache/baton/decisions-KEY <--first in-- __path__ of each package that has such modules

A build lies under a name made of the sources and the interpreter, so that one of other sources is never found: they run
as Python then. It is the same code by the same names.
"""

import hashlib
import os
import platform
import sys
from collections.abc import MutableSequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from core.compiled_library import FOLDER

ROOT = Path(__file__).resolve().parents[1]
# What compiled modules depend on, themselves included.
PACKAGES = (
    "cluster/scheduler",
    "core",
    "decode_worker",
    "engine",
    "kv_transfer",
    "prefill_worker",
    "simulator",
    "worker",
)
LIBRARY = "library"  # of a build: what its modules share
UNUSED_S = 30 * 86400.0
_PREFIX = "decisions-"


def prefer_compiled(path: MutableSequence[str], package: str) -> None:
    """Puts the package's part of the build of the present sources, if there is one, first in its `path`."""
    build = found_build()
    if build is not None:
        path.insert(0, str(build / package.replace(".", "/")))
        library = str(build / LIBRARY)
        if library not in sys.path:  # not the build itself: its folders would pass for packages
            sys.path.append(library)


@cache
def found_build() -> Path | None:
    """Of the present sources, as this process found them first. That it is used is seen by the folder's time."""
    try:
        if not any(name.startswith(_PREFIX) for name in os.listdir(FOLDER.expanduser())):  # noqa: PTH208
            return None
    except (OSError, RuntimeError):
        return None  # nobody may look, or has a home
    build = build_folder()
    if build is None or not build.is_dir():
        return None
    with suppress(OSError):  # a build that is only read is used as well
        os.utime(build)
    return build


def unused_builds(now: float) -> list[Path]:
    """Of whatever sources: those that no process has begun to use for UNUSED_S; `now` in seconds since the epoch."""
    builds = FOLDER.expanduser().glob(f"{_PREFIX}*")
    return [build for build in builds if now - build.stat().st_mtime > UNUSED_S]


def build_folder() -> Path | None:
    """Of the present sources and interpreter; None of a user without a home."""
    try:
        folder = FOLDER.expanduser()
    except RuntimeError:
        return None
    digest = hashlib.sha256(
        repr((sys.implementation.cache_tag, sys.version, sys.platform, platform.machine())).encode()
    )
    for source in (ROOT / "cluster/compiled.py", *sources()):
        digest.update(str(source.relative_to(ROOT)).encode() + source.read_bytes())
    return folder / f"{_PREFIX}{digest.hexdigest()[:24]}"


def sources() -> list[Path]:
    """Of all PACKAGES."""
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

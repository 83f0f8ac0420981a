"""The scheduler's decisions as machine code: mypyc compiles the modules of cluster/scheduler, on request.

    cluster/scheduler, core --sha256--> ~/.cache/baton/scheduler-KEY <--first in-- cluster.scheduler.__path__

A build lies under a name made of the sources and the interpreter, so that one of other sources is never found: they run
as Python then. It is the same code by the same names, twice as fast or more; bench/README.md has figures.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from core.compiled_library import FOLDER
from core.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
SCHEDULER = Path("cluster/scheduler")
# Classes that mypyc makes cannot be held weakly, nor subclassed by others, nor be protocols to them.
AS_PYTHON = {"__init__", "admission", "holders", "policy"}
_TIMEOUT_S = 600
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

setup(name="scheduler", ext_modules=mypycify({arguments!r}, opt_level="3", debug_level="0"))
"""


def prefer_compiled(path: list[str]) -> None:
    """Puts the build of the present sources, if there is one, first in the package's `path`."""
    build = build_folder()
    if build is not None and os.path.isdir(build):  # noqa: PTH112 - false, too, where nobody may look
        path.insert(0, str(build / SCHEDULER))
        sys.path.append(str(build))  # for the library that the modules share


def build_folder() -> Path | None:
    """Of the present sources and interpreter; None of a user without a home."""
    try:
        folder = FOLDER.expanduser()
    except RuntimeError:
        return None
    digest = hashlib.sha256(
        repr((sys.implementation.cache_tag, sys.version, sys.platform, platform.machine())).encode()
    )
    for source in (Path(__file__), *_sources()):
        digest.update(source.name.encode() + source.read_bytes())
    return folder / f"scheduler-{digest.hexdigest()[:24]}"


def compile_scheduler() -> Path:
    """Builds what is not built yet, in about a minute; returns its folder.

    Raises ConfigurationError without mypy, a C compiler or a home to write to, and with the tools' own words when they
    fail.
    """
    build = build_folder()
    if build is None:
        raise ConfigurationError("there is no home directory to keep the compiled scheduler in")
    try:
        if not build.is_dir():
            _compile(build)
    except OSError as error:
        raise ConfigurationError(f"the compiled scheduler cannot be kept in {build.parent}: {error}") from error
    return build


def _compile(build: Path) -> None:
    """Raises OSError where the folder cannot be made, ConfigurationError as told above."""
    if importlib.util.find_spec("mypyc") is None or importlib.util.find_spec("setuptools") is None:
        raise ConfigurationError("mypy and setuptools are needed to compile: pip install 'baton-llm[compile]'")
    build.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=build.parent) as folder:
        work, made = Path(folder, "work"), Path(folder, "made")
        for source in (ROOT / "cluster/__init__.py", ROOT / "cluster/compiled.py", *_sources()):
            copy = work / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        arguments = ["--ignore-missing-imports"]  # of packages that are not copied: theirs are taken as they come
        arguments += [str(SCHEDULER / name.name) for name in _sources() if _is_compiled(name)]
        (work / "setup.py").write_text(_SETUP.format(arguments=arguments))
        command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(made))
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ConfigurationError(f"the scheduler was not compiled within {_TIMEOUT_S} s") from error
        if done.returncode:
            raise ConfigurationError(f"the scheduler cannot be compiled: {(done.stdout + done.stderr)[-2000:]}")
        try:
            made.replace(build)
        except OSError:
            if not build.is_dir():
                raise  # or somebody else was faster


def _sources() -> list[Path]:
    """What a compiled module depends on, itself included."""
    return sorted([*(ROOT / SCHEDULER).glob("*.py"), *(ROOT / "core").rglob("*.py")])


def _is_compiled(source: Path) -> bool:
    return source.parent == ROOT / SCHEDULER and source.stem not in AS_PYTHON

"""The modules that decide as machine code: mypyc compiles those of schedulers, and what workers share with the twin.

bench/README.md has figures; `core.compiled` says where a build lies and who finds it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from core import compiled
from core.errors import ConfigurationError

SCHEDULER = "cluster/scheduler"
# Classes that mypyc makes cannot be held weakly, nor subclassed by others, nor be protocols to them.
AS_PYTHON = {"__init__", "admission", "holders", "policy"}  # of the scheduler's
BESIDE_IT = (
    "core/block_hash.py",
    "decode_worker/handoff_blocks.py",
    "decode_worker/handoffs.py",
    "decode_worker/scheduler.py",
    "decode_worker/shared_prefixes.py",
    "engine/block_pool.py",
    "engine/eviction_order.py",
    "engine/group_blocks.py",
    "engine/sequence.py",
    "kv_transfer/lease_book.py",
    "kv_transfer/share_book.py",
    "prefill_worker/deliveries.py",
    "prefill_worker/scheduler.py",
    "simulator/decode_engine.py",
    "simulator/decode_replica.py",
    "simulator/decode_tokens.py",
    "simulator/events.py",
    "simulator/network.py",
    "simulator/prefill_replica.py",
    "simulator/quiet_steps.py",
    "simulator/step_work.py",
    "worker/rates.py",
    "worker/samples.py",
)
_TIMEOUT_S = 600
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

setup(name="decisions", ext_modules=mypycify({arguments!r}, opt_level="3", debug_level="0"))
"""


def compile_decisions() -> Path:
    """Builds what is not built yet, in one to three minutes; returns its folder.

    Other builds that no process has begun to use for 30 days are removed.
    Raises ConfigurationError without mypy, a C compiler or a home to write to, and with the tools' own words when they
    fail.
    """
    build = compiled.build_folder()
    if build is None:
        raise ConfigurationError("there is no home directory to keep what is compiled in")
    try:
        if not build.is_dir():
            _compile(build)
    except OSError as error:
        raise ConfigurationError(f"what is compiled cannot be kept in {build.parent}: {error}") from error
    with suppress(OSError):  # somebody else may be at it, or own the folder
        os.utime(build)
        for unused in compiled.unused_builds(time.time()):
            shutil.rmtree(unused, ignore_errors=True)
    return build


def _compile(build: Path) -> None:
    """Raises OSError where the folder cannot be made, ConfigurationError as told above."""
    if importlib.util.find_spec("mypyc") is None or importlib.util.find_spec("setuptools") is None:
        raise ConfigurationError("mypy and setuptools are needed to compile: pip install 'baton-llm[compile]'")
    build.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=build.parent) as folder:
        work, made = Path(folder, "work"), Path(folder, "made")
        for source in (compiled.ROOT / "cluster/__init__.py", *compiled.sources()):
            copy = work / source.relative_to(compiled.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        arguments = ["--ignore-missing-imports"]  # of packages that are not copied: theirs are taken as they come
        arguments += _modules()
        (work / "setup.py").write_text(_SETUP.format(arguments=arguments))
        command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(made))
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ConfigurationError(f"nothing was compiled within {_TIMEOUT_S} s") from error
        if done.returncode:
            raise ConfigurationError(f"the decisions cannot be compiled: {(done.stdout + done.stderr)[-2000:]}")
        (made / compiled.LIBRARY).mkdir(parents=True)
        for shared in made.glob("*__mypyc*"):
            shared.replace(made / compiled.LIBRARY / shared.name)
        try:
            made.replace(build)
        except OSError:
            if not build.is_dir():
                raise  # or somebody else was faster


def _modules() -> list[str]:
    """Paths from the root."""
    of_scheduler = sorted(file for file in (compiled.ROOT / SCHEDULER).glob("*.py") if file.stem not in AS_PYTHON)
    return [*(str(file.relative_to(compiled.ROOT)) for file in of_scheduler), *BESIDE_IT]

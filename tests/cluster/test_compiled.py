"""The compiled scheduler: found by the sources that it was made of alone, and decides as they do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import compiled
from core.errors import ConfigurationError

NUM_REPLICAS, NUM_BLOCKS, NUM_REQUESTS = 60, 8_000, 120
DECIDE = f"""
import json
from bench.scheduler_fleet import CHAIN, ScheduledFleet
from cluster.scheduler import decision

fleet = ScheduledFleet({NUM_REPLICAS}, {NUM_BLOCKS}, seed=3)
made = []
for number in range({NUM_REQUESTS}):
    fleet.admission.reserve(fleet.request(CHAIN * (1 + number % 3), is_hit=number % 2 == 0), number / 100)
    for plan in fleet.admission.dispatch(number / 100):
        why = fleet.admission.decisions.find(plan.request_id)
        made.append([plan.prefill and plan.prefill.replica_id, plan.decode.replica_id, repr(why)])
print(json.dumps([decision.__file__, made]))
"""


def decide_at(home: Path) -> tuple[str, list]:
    """Where the code came from that decided, and what it decided."""
    environment = os.environ | {"HOME": str(home)}
    said = subprocess.check_output([sys.executable, "-c", DECIDE], cwd=compiled.ROOT, env=environment, text=True)
    origin, made = json.loads(said)
    return origin, made


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_compiled_decisions_are_the_same_to_the_last_digit(tmp_path, monkeypatch):
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    plain.mkdir()
    fast.mkdir()
    monkeypatch.setenv("HOME", str(fast))
    build = compiled.compile_scheduler()
    assert build.is_relative_to(fast) and compiled.compile_scheduler() == build
    assert [path.name for path in build.parent.iterdir()] == [build.name], "nothing else is left behind"

    origin, expected = decide_at(plain)
    assert origin.endswith("decision.py") and len(expected) == NUM_REQUESTS
    assert len({decode_id for _, decode_id, *_ in expected}) > 10
    origin, made = decide_at(fast)
    assert origin.startswith(str(build)) and made == expected


def test_a_build_of_other_sources_is_not_found(tmp_path, monkeypatch):
    root, path = tmp_path / "root", ["python"]
    for package in ("core", "cluster/scheduler"):
        shutil.copytree(compiled.ROOT / package, root / package)
    monkeypatch.setattr(compiled, "ROOT", root)
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", list(sys.path))

    build = compiled.build_folder()
    build.mkdir(parents=True)
    compiled.prefer_compiled(path)
    assert path == [str(build / "cluster/scheduler"), "python"] and sys.path[-1] == str(build)

    changed = root / "core/errors.py"
    changed.write_text(changed.read_text() + "\n")
    path = ["python"]
    compiled.prefer_compiled(path)
    assert path == ["python"] and compiled.build_folder() != build


def test_sources_that_cannot_be_compiled_say_why(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for package in ("core", "cluster"):
        shutil.copytree(compiled.ROOT / package, root / package)
    (root / "cluster/scheduler/rules.py").write_text("HELD: int = 'two'\n")
    monkeypatch.setattr(compiled, "ROOT", root)
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "cache")
    with pytest.raises(ConfigurationError, match=r"cluster/scheduler/rules.py:1: error: Incompatible types"):
        compiled.compile_scheduler()
    assert not [*(tmp_path / "cache").iterdir()]


def test_a_cache_folder_that_cannot_be_read_or_written_leaves_the_scheduler_as_python(tmp_path, monkeypatch):
    path = ["python"]
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / ("x" * 300))  # as of another user: even to look is an error
    compiled.prefer_compiled(path)
    assert path == ["python"]
    (tmp_path / "file").touch()
    for folder in ("x" * 300, "file"):
        monkeypatch.setattr(compiled, "FOLDER", tmp_path / folder)
        with pytest.raises(ConfigurationError, match="cannot be kept in"):
            compiled.compile_scheduler()


def test_machines_that_share_a_home_have_builds_of_their_own(monkeypatch):
    here = compiled.build_folder()
    monkeypatch.setattr("platform.machine", lambda: "other")
    assert compiled.build_folder() != here


def test_the_slower_of_two_that_compile_at_once_takes_the_build_of_the_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "cache")
    build = compiled.build_folder()

    def compile_as_another_does(command, **_):
        for library in (Path(command[-1], "slower"), build / "faster"):
            library.parent.mkdir(parents=True)
            library.touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compile_as_another_does)
    assert compiled.compile_scheduler() == build
    assert [path.name for path in build.iterdir()] == ["faster"]
    assert [path.name for path in build.parent.iterdir()] == [build.name]

"""What is compiled is found by the sources that it was made of alone, and decides as they do."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.compiled import compile_decisions
from core import compiled
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
SIMULATE = """
import json
from bench.simulation import conversations, fleet
from engine import sequence
from simulator.command import gpu_costs
from simulator.twin import Twin

spec = fleet(8, report_s=0.25)
result = Twin(spec, gpu_costs(spec)).run(conversations(60, per_s=8.0, seed=3))
print(json.dumps([sequence.__file__, [*map(repr, result.records), result.num_events]]))
"""


SEND = """
import json
import pickle
from bench.scheduler_fleet import ScheduledFleet
from cluster.scheduler import decision
from core.kv_groups import group_layers
from dataclasses import replace

told = next(iter(ScheduledFleet(4, 100, seed=3).admission.fleet)).info
told = replace(told, layout=replace(told.layout, groups=group_layers([128, None, 128, 128])))
print(json.dumps([decision.__file__, [pickle.loads(pickle.dumps(told)) == told]]))
"""


def told_at(home: Path, program: str) -> tuple[str, list]:
    """Where the code came from that ran, and what it said: as installed, with the sources not on the path."""
    environment, elsewhere = os.environ | {"HOME": str(home)}, home.parent
    said = subprocess.check_output([sys.executable, "-c", program], cwd=elsewhere, env=environment, text=True)
    origin, made = json.loads(said)
    return origin, made


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_compiled_decisions_and_simulations_are_the_same_to_the_last_digit(tmp_path, monkeypatch):
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    plain.mkdir()
    fast.mkdir()
    monkeypatch.setenv("HOME", str(fast))
    build = compile_decisions()
    assert build.is_relative_to(fast) and compile_decisions() == build
    assert [path.name for path in build.parent.iterdir()] == [build.name], "nothing else is left behind"

    origin, expected = told_at(plain, DECIDE)
    assert origin.endswith("decision.py") and len(expected) == NUM_REQUESTS
    assert len({decode_id for _, decode_id, *_ in expected}) > 10
    origin, made = told_at(fast, DECIDE)
    assert origin.startswith(str(build)) and made == expected

    origin, made = told_at(fast, SEND)
    assert origin.startswith(str(build)) and made == [True], "Ray sends such between processes"

    origin, expected = told_at(plain, SIMULATE)
    assert origin.endswith("sequence.py") and len(expected) == 60 + 1
    origin, made = told_at(fast, SIMULATE)
    assert origin.startswith(str(build)) and made == expected


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the sources, whose builds lie beside it; processes look once, this one looks anew."""
    root = tmp_path / "root"
    for package in (*compiled.PACKAGES, "cluster"):
        shutil.copytree(compiled.ROOT / package, root / package, dirs_exist_ok=True)
    monkeypatch.setattr(compiled, "ROOT", root)
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", list(sys.path))
    compiled.found_build.cache_clear()
    yield root
    compiled.found_build.cache_clear()


def preferred() -> list[str]:
    compiled.found_build.cache_clear()
    path = ["python"]
    compiled.prefer_compiled(path, "cluster.scheduler")
    return path


@pytest.mark.parametrize("name", ["core/errors.py", "engine/sequence.py", "simulator/cost/gpu_cost_model.py"])
def test_a_build_of_other_sources_is_not_found(root, name):
    build = compiled.build_folder()
    assert preferred() == ["python"]
    build.mkdir(parents=True)
    assert preferred() == [str(build / "cluster/scheduler"), "python"] and sys.path[-1] == str(build / compiled.LIBRARY)

    changed = root / name
    changed.write_text(changed.read_text() + "\n")
    assert preferred() == ["python"] and compiled.build_folder() != build


def test_builds_that_nobody_uses_go_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path / ".cache/baton"
    days = {"decisions-new": 0, "decisions-used": 29, "decisions-old": 31, "stream_copy-old": 99}
    for name in days:
        (cache / name / compiled.LIBRARY).mkdir(parents=True)
    build = compiled.build_folder()
    build.mkdir()

    def let_pass(**days: float) -> None:
        for name, age in days.items():
            os.utime(cache / name, (time.time() - 86400 * age,) * 2)

    let_pass(**days, **{build.name: 99})
    compiled.found_build.cache_clear()
    assert compiled.found_build() == build, "a process begins to use it"
    assert build not in compiled.unused_builds(time.time())

    let_pass(**{build.name: 99})
    assert compile_decisions() == build
    kept = {"decisions-new", "decisions-used", "stream_copy-old", build.name}
    assert {path.name for path in cache.iterdir()} == kept
    compiled.found_build.cache_clear()


def test_sources_that_cannot_be_compiled_say_why(root):
    (root / "cluster/scheduler/rules.py").write_text("HELD: int = 'two'\n")
    with pytest.raises(ConfigurationError, match=r"cluster/scheduler/rules.py:1: error: Incompatible types"):
        compile_decisions()
    assert not [*compiled.FOLDER.iterdir()]


def test_a_cache_folder_that_cannot_be_read_or_written_leaves_all_as_python(root, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / ("x" * 300))  # as of another user: even to look is an error
    assert preferred() == ["python"]
    (tmp_path / "file").touch()
    for folder in ("x" * 300, "file"):
        monkeypatch.setattr(compiled, "FOLDER", tmp_path / folder)
        with pytest.raises(ConfigurationError, match="cannot be kept in"):
            compile_decisions()


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
    assert compile_decisions() == build
    assert [path.name for path in build.iterdir()] == ["faster"]
    assert [path.name for path in build.parent.iterdir()] == [build.name]

"""The keeper restarts what it remembers, and ends with Ray. Fake processes, real signals."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import gcs_keeper
from cluster.gcs_keeper import GcsKeeper
from core.errors import ConfigurationError

PORT = 61234
SLEEP = ("-I", "-S", "-c", "import time; time.sleep(300)")


@pytest.fixture
def ray_head(tmp_path):
    """A "gcs_server" and a "raylet" of one session, as `ray start --head` leaves them."""

    def start(name: str, *arguments: str) -> subprocess.Popen:
        executable = tmp_path / name
        executable.symlink_to(sys.executable)
        environment = {**os.environ, "RAY_gcs_storage": "rocksdb"}
        return subprocess.Popen([executable, *SLEEP, *arguments], cwd=tmp_path, env=environment)

    gcs = start("gcs_server", f"--gcs_server_port={PORT}", "--session-name=session_1")
    raylet = start("raylet", "--session-name=session_1")
    yield gcs, raylet
    for process in (gcs, raylet):
        process.kill()
        process.wait()


@pytest.fixture
def keeper(ray_head, caplog):
    caplog.set_level(logging.INFO)
    stop = threading.Event()
    found = GcsKeeper(PORT, stop)
    thread = threading.Thread(target=found.run)
    thread.start()
    yield found, thread
    stop.set()
    thread.join()


def wait_until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def entries(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().split("\0")


def test_a_gcs_that_died_is_started_again_with_the_same_command_environment_and_folder(ray_head, keeper, tmp_path):
    first = ray_head[0].pid
    command, environment = entries(first, "cmdline"), entries(first, "environ")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: keeper[0].pid != first)
    second = keeper[0].pid
    wait_until(lambda: entries(second, "cmdline") == command)  # the new process is there before its command is
    assert sorted(entries(second, "environ")) == sorted(environment)
    assert Path(f"/proc/{second}/cwd").resolve() == tmp_path.resolve()

    os.kill(second, signal.SIGKILL)
    wait_until(lambda: keeper[0].pid != second)
    os.kill(keeper[0].pid, signal.SIGKILL)


def test_when_ray_was_stopped_nothing_is_restarted(ray_head, keeper, caplog):
    gcs, raylet = ray_head
    raylet.terminate()
    gcs.terminate()
    keeper[1].join(timeout=20)
    assert not keeper[1].is_alive()
    assert keeper[0].pid == gcs.pid
    assert "nothing is left to keep" in caplog.text


def test_a_port_without_gcs_is_named(monkeypatch):
    monkeypatch.setattr(gcs_keeper, "FIND_TIMEOUT_S", 0.3)
    with pytest.raises(ConfigurationError, match="gcs_server_port=1 runs"):
        GcsKeeper(1, threading.Event())

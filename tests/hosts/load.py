"""A client process beside the bridge, and what it saw."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.hosts.testbed import PYTHON, ROOT, SCRIPT, Fleet


@dataclass(frozen=True)
class Seen:
    """The client's account: answers, errors in words, answers with a wrong token."""

    done: int
    errors: list[str]
    wrong: list[str]
    longest_gap_s: float


class Load:
    """Runs from construction until `finish`."""

    def __init__(self, fleet: Fleet, expected: dict[str, list[int]], num_streams: int) -> None:
        folder = fleet.hosts.folder
        file = folder / "expected.json"
        file.write_text(json.dumps(expected))
        self._stop = folder / f"stop-{time.monotonic_ns()}"
        environment = os.environ | {"STATE": str(folder / "state"), "BIN": str(PYTHON.parent), "PYTHONPATH": str(ROOT)}
        command = [str(PYTHON), "-m", "tests.hosts.client", fleet.url, fleet.api_key, str(file), str(num_streams)]
        self._process = subprocess.Popen(
            ["sh", str(SCRIPT), "hub", *command, str(self._stop)],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        fleet.hosts.clients.append(self._process)

    @property
    def num_done(self) -> int:
        """Answers so far."""
        with suppress(OSError, ValueError):
            return int(self._stop.with_suffix(".progress").read_text())
        return 0

    def until_done(self, more: int, timeout_s: float = 120) -> None:
        """Waits for so many further answers."""
        wanted = self.num_done + more
        until(lambda: self.num_done >= wanted, timeout_s, f"{more} more answers")

    def finish(self) -> Seen:
        """Lets the streams end; returns what the client saw."""
        self._stop.touch()
        output, _ = self._process.communicate(timeout=180)
        return Seen(**json.loads(output.splitlines()[-1]))


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Waits; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)
    return time.monotonic() - started

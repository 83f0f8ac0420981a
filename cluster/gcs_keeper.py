"""Restarts the head's GCS when it dies, which `ray start` does not: `python -m cluster.gcs_keeper --port 6379`.

The GCS that `ray start --head` made is found by its port. Its command line, environment and folder are remembered and
run again when it is gone: the same port, session and storage, so raylets and drivers find it again. They try for
RAY_gcs_rpc_server_reconnect_timeout_s. When the head's raylet is gone too, Ray was stopped and the keeper ends.
"""

import argparse
import logging
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigurationError
from core.telemetry import configure_logging

logger = logging.getLogger(__name__)

POLL_S = 0.2
STOPPING_S = 1.0  # `ray stop` ends the raylet too: one that lives on for this time was not told to end
FIND_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Process:
    """A process of this host; `started` tells it from a later one with the same number."""

    pid: int
    started: str
    command: tuple[str, ...]

    def is_called(self, name: str, argument: str) -> bool:
        """Whether it runs the executable `name` with `argument`."""
        return Path(self.command[0]).name == name and argument in self.command[1:]

    def option(self, name: str) -> str:
        """The argument `--name=...` in full."""
        return next(argument for argument in self.command if argument.startswith(f"--{name}="))


class GcsKeeper:
    """Watches one GCS and the raylet of its node."""

    def __init__(self, port: int, stop: threading.Event, proc: Path = Path("/proc")) -> None:
        """Waits for both processes. Raises ConfigurationError when they are not there in time."""
        self._proc = proc
        self._stop = stop
        self._gcs = self._await("gcs_server", f"--gcs_server_port={port}")
        self._raylet = self._await("raylet", self._gcs.option("session-name"))
        self._environment = self._read_environment(self._gcs.pid)
        self._folder = (proc / str(self._gcs.pid) / "cwd").resolve()

    @property
    def pid(self) -> int:
        """The GCS that is watched now."""
        return self._gcs.pid

    def run(self) -> None:
        """Returns when Ray was stopped on this host, or `stop` is set."""
        while not self._stop.wait(POLL_S):
            if self._is_alive(self._gcs):
                continue
            if self._stop.wait(STOPPING_S):
                return
            if not self._is_alive(self._raylet):
                logger.info("the raylet has ended too: nothing is left to keep")
                return
            self._start()

    def _start(self) -> None:
        started = subprocess.Popen(
            self._gcs.command,
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # Ray gave it log files by argument
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it outlives the keeper
        )
        logger.warning("GCS %d is gone; started again as %d", self._gcs.pid, started.pid)
        self._gcs = Process(started.pid, self._started(started.pid), self._gcs.command)

    def _await(self, name: str, argument: str) -> Process:
        waited_s = 0.0
        while waited_s < FIND_TIMEOUT_S:
            for process in self._processes():
                if process.is_called(name, argument):
                    return process
            waited_s += POLL_S
            self._stop.wait(POLL_S)
        raise ConfigurationError(f"no {name} with {argument} runs on this host after {FIND_TIMEOUT_S:.0f} s")

    def _is_alive(self, process: Process) -> bool:
        return process.started != "" and self._started(process.pid) == process.started

    def _started(self, pid: int) -> str:
        """When the process began, in clock ticks since boot; empty when it has ended, a zombie included."""
        try:
            fields = (self._proc / str(pid) / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]

    def _processes(self) -> Iterator[Process]:
        for folder in self._proc.glob("[0-9]*"):
            try:
                command = tuple((folder / "cmdline").read_text().split("\0")[:-1])
            except OSError:
                continue  # it has ended meanwhile
            if command and (started := self._started(int(folder.name))):
                yield Process(int(folder.name), started, command)

    def _read_environment(self, pid: int) -> dict[str, str]:
        entries = (self._proc / str(pid) / "environ").read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def main() -> None:
    """Runs until Ray is stopped on this host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=6379)
    configure_logging(None)
    GcsKeeper(parser.parse_args().port, threading.Event()).run()


if __name__ == "__main__":
    main()

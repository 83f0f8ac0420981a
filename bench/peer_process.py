"""A program that stands for a peer in a process of its own, driven over standard input: one line of JSON per order.

Between orders its processes are stopped, since an engine's threads may spin and would slow the others down.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


class PeerProcess:
    """Answers orders; its lines that begin with BENCH are ours, since engines print to standard output too."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """`environment` is added to this process's own. Raises RuntimeError when it does not get ready."""
        self._name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        if self._answer() != "ready":
            raise RuntimeError(f"{name} did not start: {' '.join(command)}")
        os.killpg(self._process.pid, signal.SIGSTOP)

    def ask(self, order: object) -> float:
        """What it measured, in seconds. Raises RuntimeError when it ended."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        print(json.dumps(order), file=self._process.stdin, flush=True)
        seconds = float(str(self._answer()))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """Ends it and what it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        raise RuntimeError(f"{self._name} ended")

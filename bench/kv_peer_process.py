"""Another transfer engine in processes of its own, driven over standard input: one line of JSON per movement.

Between movements they are stopped, since an engine's threads may spin and would slow the others down.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

from bench.kv_pair import Case

SCRIPT = Path(__file__).with_name("kv_peer.py")


class PeerProcess:
    """Pulls bytes from a second process with one engine; see kv_peer.py."""

    def __init__(self, python: Path, engine: str, pool_bytes: int) -> None:
        """Raises RuntimeError when the engine does not start under that interpreter."""
        command = [str(python), str(SCRIPT), engine, str(pool_bytes)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        if self._answer() != "ready":
            raise RuntimeError(f"{engine} did not start under {python}")
        os.killpg(self._process.pid, signal.SIGSTOP)

    def move(self, case: Case) -> float:
        """Seconds to pull a case's bytes: each run of blocks as one piece, scattered as the case's are."""
        offsets = [block for slab in case.slabs for block in slab.source.blocks]
        is_contiguous = offsets == list(range(len(offsets)))
        pieces = [0] if is_contiguous else sorted(set(offsets), key=offsets.index)
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        print(json.dumps([case.num_bytes // len(pieces), pieces]), file=self._process.stdin, flush=True)
        seconds = float(str(self._answer()))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """Ends both processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> object:
        """The next line that is ours; engines print to standard output too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("BENCH "):
                return json.loads(line.removeprefix("BENCH "))
        raise RuntimeError("the other engine ended")

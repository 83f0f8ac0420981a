"""How much of the machine others used during a measurement: cores busy, less those of this process and its children."""

import os
import time
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
IDLE, WAITS = 3, 4  # columns of /proc/stat


class ForeignLoad:
    """From its making on."""

    def __init__(self) -> None:
        self._began = self._seconds()

    def cores(self) -> float:
        """Busy with other things since then, on average; 0 where there is no /proc."""
        wall_s, busy_s, own_s = (now - then for now, then in zip(self._seconds(), self._began, strict=True))
        return max(0.0, (busy_s - own_s) / max(wall_s, TICK_S))

    def _seconds(self) -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.monotonic(), 0.0, 0.0
        ticks = [int(word) for word in stat.read_text().partition("\n")[0].split()[1:9]]
        busy_s = (sum(ticks) - ticks[IDLE] - ticks[WAITS]) * TICK_S
        return time.monotonic(), busy_s, sum(map(_cpu_s, _tree(os.getpid())))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def _cpu_s(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended meanwhile
        return 0.0
    return (int(words[11]) + int(words[12])) * TICK_S

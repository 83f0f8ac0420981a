"""Where checks read: this host's files, limits, sockets and programs, or a test's."""

import fcntl
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_PROGRAM_TIMEOUT_S = 20.0

UNLIMITED = resource.RLIM_INFINITY


def installed_version(distribution: str) -> str:
    """Empty when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def run_program(*command: str) -> str | None:
    """Standard output; None when there is no such program. Raises OSError when it fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} does not answer") from error
    if result.returncode:
        raise OSError((result.stderr or result.stdout).strip() or f"{command[0]} ends with {result.returncode}")
    return result.stdout


def address_of(interface: str) -> str:
    """IPv4 address of an interface, empty when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            return ""
    return socket.inet_ntoa(packed[20:24])


def is_port_free(port: int) -> bool:
    """Whether all interfaces could be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class Host:
    """Readers; the defaults are this host's."""

    environment: Mapping[str, str]
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    shm: Path = Path("/dev/shm")
    python: tuple[int, ...] = field(default_factory=lambda: sys.version_info[:3])
    num_cpus: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    version: Callable[[str], str] = installed_version
    run: Callable[..., str | None] = run_program
    address: Callable[[str], str] = address_of
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit
    is_port_free: Callable[[int], bool] = is_port_free

    def read(self, path: Path) -> str:
        """Content without surrounding space, empty when it cannot be read."""
        try:
            return path.read_text().strip()
        except OSError:
            return ""

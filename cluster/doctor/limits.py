"""Checks of what the kernel grants: memory, shared memory, locked memory, files, CPUs."""

import os
import resource
from collections.abc import Iterator

from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.doctor.host import UNLIMITED, Host
from cluster.doctor.network import rdma_devices

GIB = 1 << 30
MIN_MEMORY_BYTES, GOOD_MEMORY_BYTES = GIB, 4 * GIB
MIN_SHM_BYTES, GOOD_SHM_BYTES = 80 << 20, GIB  # cluster.object_store_mib cannot be below the first
MIN_FILES, GOOD_FILES = 4096, 65536  # a connection per peer and stream, and Ray's own


def check_memory(host: Host) -> Iterator[Finding]:
    """Available memory, a control group's limit included; KV of pools on CPU is part of it."""
    lines = host.read(host.proc / "meminfo").splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in kib:
        yield warn("memory", "cannot be read", "look at /proc/meminfo")
        return
    free_bytes = kib["MemAvailable"] * 1024
    group = host.sys / "fs" / "cgroup"
    limit, used = host.read(group / "memory.max"), host.read(group / "memory.current")
    if limit.isdigit() and used.isdigit():
        free_bytes = min(free_bytes, int(limit) - int(used))
    read = f"{free_bytes / GIB:.1f} GiB available"
    if free_bytes < MIN_MEMORY_BYTES:
        yield fail("memory", read, "end other programs, or raise the container's limit")
    elif free_bytes < GOOD_MEMORY_BYTES:
        yield warn("memory", read, "enough for the demo model alone")
    else:
        yield ok("memory", read)


def check_shared_memory(host: Host) -> Iterator[Finding]:
    """/dev/shm holds Ray's object store and NCCL's buffers between GPUs of a host. KV on CPU does not lie there."""
    try:
        found = os.statvfs(host.shm)
    except OSError as error:
        yield fail("shared memory", str(error), "mount a tmpfs there")
        return
    free_bytes = found.f_bavail * found.f_frsize
    read = f"{free_bytes / GIB:.2f} GiB free in {host.shm}"
    if free_bytes < MIN_SHM_BYTES:
        yield fail("shared memory", read, "enlarge it: docker run --shm-size=8g, or a memory volume in Kubernetes")
    elif free_bytes < GOOD_SHM_BYTES:
        yield warn("shared memory", read, "enlarge it to several GiB before serving on GPUs")
    else:
        yield ok("shared memory", read)


def check_locked_memory(host: Host) -> Iterator[Finding]:
    """RDMA registers buffers that must not be swapped."""
    soft, hard = host.limit(resource.RLIMIT_MEMLOCK)
    read = "unlimited" if soft == UNLIMITED else f"{soft / 2**20:.0f} MiB"
    if soft == UNLIMITED:
        yield ok("locked memory", read)
    elif not rdma_devices(host):
        yield ok("locked memory", f"{read}; no RDMA device needs more")
    elif hard == UNLIMITED:
        yield warn("locked memory", read, "the shell may raise it: ulimit -l unlimited, as node.sh does")
    else:
        yield fail("locked memory", read, "set memlock unlimited in /etc/security/limits.conf or --ulimit memlock=-1")


def check_open_files(host: Host) -> Iterator[Finding]:
    """Sockets count too."""
    soft, hard = host.limit(resource.RLIMIT_NOFILE)
    read = f"{_count(soft)}, at most {_count(hard)}"
    if hard != UNLIMITED and hard < MIN_FILES:
        yield fail("open files", read, f"set nofile to {GOOD_FILES} in /etc/security/limits.conf")
    elif soft != UNLIMITED and soft < GOOD_FILES:
        is_low = hard != UNLIMITED and hard < GOOD_FILES
        where = "/etc/security/limits.conf" if is_low else "the shell before Ray starts, as node.sh does"
        yield warn("open files", read, f"raise it to {GOOD_FILES} in {where}")
    else:
        yield ok("open files", read)


def check_cpus(host: Host) -> Iterator[Finding]:
    """CPUs that this process may run on."""
    if host.num_cpus < 2:
        yield warn("cpus", f"{host.num_cpus}", "ingress, scheduler and ranks share one CPU: latency will show it")
    else:
        yield ok("cpus", f"{host.num_cpus}")


def _count(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else str(limit)

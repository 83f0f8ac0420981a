"""What a host's network ports can do, by what Linux tells of them: where estimates of transfers start."""

import re
from pathlib import Path

_CLASSES = Path("/sys/class")
_BYTES_PER_GBIT = 1e9 / 8
_RATE = re.compile(r"(\d+(?:\.\d+)?) Gb/sec")
_UNKNOWN = (2**16 - 1, 2**32 - 1)


def port_bytes_per_s(device: str, num_ranks: int, classes: Path = _CLASSES) -> float:
    """Of a replica's ranks on one host together, each way, at best; 0: nothing tells.

    KV of GPUs goes over InfiniBand or what looks like it (RoCE, EFA), a port for each rank while there are as many;
    that of CPUs, and of hosts without, over the fastest Ethernet port.
    """
    fabric = _fabric_ports(classes / "infiniband") if device == "cuda" else []
    ports = sorted(fabric, reverse=True)[:num_ranks] or sorted(_ethernet_ports(classes / "net"), reverse=True)[:1]
    return sum(ports)


def _fabric_ports(folder: Path) -> list[float]:
    """Bytes per second of active ports, which say such as `4: ACTIVE` and `400 Gb/sec (4X NDR)`."""
    found = []
    for port in folder.glob("*/ports/*"):
        rate = _RATE.match(_read(port / "rate"))
        if rate is not None and _read(port / "state").startswith("4:"):
            found.append(float(rate[1]) * _BYTES_PER_GBIT)
    return found


def _ethernet_ports(folder: Path) -> list[float]:
    """Bytes per second of ports of devices, which say their Mbit/s, or -1 in as many bits as they have."""
    found = []
    for port in folder.glob("*"):
        speed = _read(port / "speed")
        if (port / "device").exists() and speed.isdecimal() and int(speed) not in _UNKNOWN:
            found.append(float(speed) * _BYTES_PER_GBIT / 1000)
    return found


def _read(file: Path) -> str:
    """Empty when it cannot be read: a port that is down says no speed."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""

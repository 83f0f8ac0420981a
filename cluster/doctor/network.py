"""Checks of interfaces, RDMA devices and ports."""

from collections.abc import Iterator

from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.doctor.host import Host
from cluster.doctor.software import gpu_names

PORTS = {6379: "Ray's GCS", 8000: "HTTP", 8265: "Ray's dashboard", 8404: "HAProxy's statistics", 9101: "its metrics"}
EFA_VENDOR = "0x1d0f"  # Amazon's number in the PCI registry
VIRTUAL = ("lo", "docker", "veth", "br-", "virbr", "ifb", "cni", "flannel", "cali")


def interfaces(host: Host) -> dict[str, str]:
    """IPv4 address by name; interfaces without one are left out."""
    names = sorted(folder.name for folder in (host.sys / "class" / "net").glob("*"))
    return {name: address for name in names if (address := host.address(name))}


def check_interfaces(host: Host) -> Iterator[Finding]:
    """NCCL and Gloo find an interface that other hosts reach."""
    found = interfaces(host)
    read = ", ".join(f"{name} {address}{_speed(host, name)}" for name, address in found.items())
    outward = [name for name in found if not name.startswith(VIRTUAL)]
    if outward:
        yield ok("interfaces", read)
    else:
        yield warn("interfaces", read or "none has an address", "other hosts cannot reach this one")
    wanted = host.environment.get("NCCL_SOCKET_IFNAME", "")
    if wanted:
        matching = [name for name in found if _matches(wanted, name)]
        if matching:
            yield ok("NCCL_SOCKET_IFNAME", f"{wanted}: {', '.join(matching)}")
        else:
            yield fail("NCCL_SOCKET_IFNAME", f"{wanted}: no interface", f"choose of {', '.join(found) or 'none'}")
    elif len(outward) > 1 and gpu_names(host):
        advice = "NCCL may take one that other hosts do not reach: set it to the right one"
        yield warn("NCCL_SOCKET_IFNAME", f"not set, with {', '.join(outward)}", advice)
    else:
        yield ok("NCCL_SOCKET_IFNAME", "not set")


def _matches(wanted: str, name: str) -> bool:
    """NCCL's rule: a list of prefixes; a leading = asks for whole names, a leading ^ excludes."""
    is_excluding = wanted.startswith("^")
    is_exact = wanted.lstrip("^").startswith("=")
    listed = wanted.lstrip("^=").split(",")
    return any(name == one if is_exact else name.startswith(one) for one in listed) != is_excluding


def _speed(host: Host, name: str) -> str:
    """Of a physical interface, as the driver tells it in Mbit/s."""
    mbits = host.read(host.sys / "class" / "net" / name / "speed")
    return f" {int(mbits) / 1000:g} Gbit/s" if mbits.isdigit() and int(mbits) else ""


def rdma_devices(host: Host) -> tuple[str, ...]:
    """Names under /sys/class/infiniband: InfiniBand, RoCE and EFA."""
    return tuple(sorted(folder.name for folder in (host.sys / "class" / "infiniband").glob("*")))


def check_rdma(host: Host) -> Iterator[Finding]:
    """InfiniBand or EFA devices, and whether their ports are up."""
    devices = rdma_devices(host)
    if not devices:
        if gpu_names(host):
            yield warn("rdma", "no InfiniBand, RoCE or EFA device", "NCCL uses TCP between hosts, which is slower")
        else:
            yield ok("rdma", "none")
        return
    folder = host.sys / "class" / "infiniband"
    down, kinds = [], {"EFA": 0, "InfiniBand or RoCE": 0}
    for device in devices:
        is_efa = host.read(folder / device / "device" / "vendor") == EFA_VENDOR
        kinds["EFA" if is_efa else "InfiniBand or RoCE"] += 1
        states = [host.read(port / "state") for port in sorted((folder / device / "ports").glob("*"))]
        if not any("ACTIVE" in state for state in states):
            down.append(device)
    read = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    if down:
        yield warn("rdma", f"{read}; not active: {', '.join(down)}", "check cables and subnet manager")
    else:
        yield ok("rdma", read)


def check_ports(host: Host) -> Iterator[Finding]:
    """Ports that the head or every host listens on."""
    taken = [f"{port} ({use})" for port, use in PORTS.items() if not host.is_port_free(port)]
    if taken:
        yield warn("ports", f"in use: {', '.join(taken)}", "fine if Ray or Baton listens there; else stop what does")
    else:
        yield ok("ports", f"free: {', '.join(map(str, PORTS))}")

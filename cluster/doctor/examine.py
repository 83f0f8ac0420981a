"""All checks of one host."""

from cluster.doctor.finding import HostReport
from cluster.doctor.host import Host
from cluster.doctor.limits import (
    check_cpus,
    check_locked_memory,
    check_memory,
    check_open_files,
    check_shared_memory,
)
from cluster.doctor.network import check_interfaces, check_ports, check_rdma
from cluster.doctor.software import check_gpus, check_versions, versions

CHECKS = (
    check_versions,
    check_gpus,
    check_interfaces,
    check_rdma,
    check_locked_memory,
    check_open_files,
    check_shared_memory,
    check_memory,
    check_cpus,
)


def examine(name: str, host: Host, is_serving: bool) -> HostReport:
    """`is_serving`: Ray runs here already, so that its ports are taken."""
    checks = CHECKS if is_serving else (*CHECKS, check_ports)
    return HostReport(name, tuple(finding for check in checks for finding in check(host)), versions(host))

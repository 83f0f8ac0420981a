"""What protects the control plane: the fleet's secret, and optionally certificates; files that others can read are
refused.
"""

import ipaddress
import stat
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import model_validator

from core.errors import ConfigurationError
from core.section import Section

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class TlsFiles:
    """PEM, as read."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


class TlsConfig(Section):
    """Mutual TLS between all processes of the fleet: on when its three files are named, at equal paths on every host.

    Replicas are reached by IP address, so one name stands in every certificate instead of addresses.
    """

    ca_file: str = ""  # PEM: whose certificates are taken for the fleet's own
    certificate_file: str = ""  # PEM: of this host, or one for all, naming server_name; for server and client
    key_file: str = ""  # PEM, for its owner alone
    server_name: str = "baton"  # a DNS name that every certificate of the fleet carries

    @property
    def is_on(self) -> bool:
        """Whether the control plane is encrypted and both ends show certificates."""
        return bool(self.ca_file)

    @model_validator(mode="after")
    def _whole(self) -> "TlsConfig":
        files = {"ca_file": self.ca_file, "certificate_file": self.certificate_file, "key_file": self.key_file}
        missing = [name for name, path in files.items() if not path]
        if 0 < len(missing) < len(files):
            raise ValueError(f"{', '.join(missing)} missing: TLS needs all of {', '.join(files)}, or none")
        if not self.server_name:
            raise ValueError("server_name is empty")
        return self

    def read(self) -> TlsFiles:
        """Of a section that is on. Raises ConfigurationError naming the field and file that cannot be used."""
        return TlsFiles(
            _read(self.ca_file, "cluster.tls.ca_file"),
            _read(self.certificate_file, "cluster.tls.certificate_file"),
            read_private(self.key_file, "cluster.tls.key_file"),
        )


@dataclass(frozen=True)
class Security:
    """What a process shows its peers, and asks of them."""

    secret: str = field(default="", repr=False)  # shared by the fleet; empty: calls without one are served
    tls: TlsConfig = field(default_factory=TlsConfig)

    def check(self, host: str) -> None:
        """Raises ConfigurationError when strangers could call who listens on `host`, or a file of TLS is unfit."""
        if not self.secret and not is_loopback(host):
            raise ConfigurationError(
                f"cluster.secret is empty: the control plane listens on {host}, where others than this machine reach "
                "it; set cluster.secret, cluster.secret_file or BATON_CLUSTER_SECRET to the same for all processes",
                field="cluster.secret",
            )
        if self.tls.is_on:
            self.tls.read()


UNGUARDED = Security()  # processes of one machine, among themselves


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`; names but localhost are taken to lead further."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_private(path: str, name: str) -> bytes:
    """What a file holds that only its owner may touch. Raises ConfigurationError with the field's name and the mode."""
    file = Path(path).expanduser()
    data = _read(path, name)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & _OTHERS:
        raise ConfigurationError(
            f"{name} {path} has mode {mode:04o}, which lets others than its owner at it; `chmod 600` it", field=name
        )
    return data


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{name} {path} cannot be read: {error.strerror}", field=name) from error

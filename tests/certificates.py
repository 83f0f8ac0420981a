"""Certificates as operators make them: by ray_configs/certificates.sh, in a home folder of its own."""

import subprocess
from pathlib import Path

from core.security import TlsConfig

NAMES = ("ca", "certificate", "key")
SCRIPT = Path(__file__).parent.parent / "ray_configs" / "certificates.sh"


def make_certificates(home: Path) -> TlsConfig:
    """A fleet's authority and certificate; another folder has another authority."""
    home.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", SCRIPT], env=environment, check=True, capture_output=True, timeout=30)
    return TlsConfig(**{f"{name}_file": str(home / ".baton" / "tls" / f"{name}.pem") for name in NAMES})

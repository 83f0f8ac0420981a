"""What a check says."""

from dataclasses import asdict, dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """`warn` serves, but slower or less safely; `fail` does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was read, and what to do about it where something should be done."""

    check: str
    verdict: Verdict
    read: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {name: str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class HostReport:
    """One host's findings, and its versions by name for comparison with others."""

    host: str
    findings: tuple[Finding, ...]
    versions: dict[str, str]


def ok(check: str, read: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Verdict.OK, read)


def warn(check: str, read: str, advice: str) -> Finding:
    """Serves, but should not stay so."""
    return Finding(check, Verdict.WARN, read, advice)


def fail(check: str, read: str, advice: str) -> Finding:
    """Does not serve."""
    return Finding(check, Verdict.FAIL, read, advice)

"""Which versions of the wire protocol a process speaks, and whether two processes have one in common."""

from dataclasses import dataclass

from core.errors import Incompatible
from core.version import OLDEST_PROTOCOL, PROTOCOL

PROTOCOL_KEY = "baton-protocol"  # metadata of every call and of every answer


@dataclass(frozen=True)
class Protocols:
    """All versions from `oldest` to `newest`.

    ours      oldest ======= newest
    theirs             oldest ======= newest      overlap: both understand every message of the other
    theirs                             === newest  apart: refused
    """

    newest: int
    oldest: int

    def __str__(self) -> str:
        return f"protocol {self.newest}" if self.newest == self.oldest else f"protocols {self.oldest} to {self.newest}"

    @property
    def header(self) -> str:
        """The value of PROTOCOL_KEY."""
        return f"{self.newest},{self.oldest}"

    def overlap(self, other: "Protocols") -> bool:
        """Whether some version is spoken by both."""
        return self.oldest <= other.newest and other.oldest <= self.newest


OURS = Protocols(PROTOCOL, OLDEST_PROTOCOL)
FIRST = Protocols(1, 1)  # sends no header


def parse_protocols(header: str | None) -> Protocols:
    """What a peer says of itself. Raises Incompatible for what is no such header."""
    if header is None:
        return FIRST
    newest, _, oldest = header.partition(",")
    if not (newest.isdecimal() and oldest.isdecimal()):
        raise Incompatible(f"the peer's {PROTOCOL_KEY} is {header!r} and not NEWEST,OLDEST", field=PROTOCOL_KEY)
    return Protocols(int(newest), int(oldest))

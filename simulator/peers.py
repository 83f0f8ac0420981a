"""Who is who among simulated processes, and what the model says: what replicas and ingresses ask of the fleet. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from core.messages.fleet import ReplicaInfo

if TYPE_CHECKING:
    from simulator.decode_replica import DecodeReplica
    from simulator.host import Host
    from simulator.ingress import Ingress
    from simulator.prefill_replica import PrefillReplica


class Peers(Protocol):
    """A replica that has gone is found, too: calls to it are refused."""

    def host(self, info: ReplicaInfo) -> "Host":
        """Of either role."""
        ...

    def prefill(self, info: ReplicaInfo) -> "PrefillReplica":
        """By the identity of an incarnation."""
        ...

    def decode(self, info: ReplicaInfo) -> "DecodeReplica":
        """By the identity of an incarnation."""
        ...

    def ingress(self, request_id: str) -> "Ingress":
        """The one that a request came to."""
        ...

    def output(self, request_id: str) -> Sequence[int]:
        """All that the model says."""
        ...

"""Who is who: the names and addresses that messages refer to."""

from dataclasses import dataclass
from enum import StrEnum

from core.kv_layout import Compatibility, KVLayout


class Role(StrEnum):
    """What a pool's replicas are for; every engine can do both."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ReplicaInfo:
    """One model copy as others see it. `incarnation` differs after every restart of its processes."""

    replica_id: str
    role: Role
    incarnation: int
    rank_addresses: tuple[str, ...]  # host:port of each rank's RPC server; the first speaks for the replica
    layout: KVLayout
    compatibility: Compatibility
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    zone: str = ""
    software: str = ""  # versions that it runs
    generation: str = ""  # of configuration and weights; pairs form within one
    protocol: int = 1  # of the control plane, the newest that it speaks; 1 did not say
    warm_up_s: float = 0.0  # before it was ready: compilation, graphs, first steps; 0 did not say
    flop_per_s: float = 0.0  # peak of its devices, over all ranks; 0 did not say
    read_bytes_per_s: float = 0.0  # of their memory, likewise
    port_bytes_per_s: float = 0.0  # peak of its network ports, each way, likewise
    num_active_parameters: int = 0  # weights that one token is multiplied with; 0 did not say
    parameter_bytes: int = 0  # of all weights

    @property
    def address(self) -> str:
        """Where the replica is spoken to."""
        return self.rank_addresses[0]


@dataclass(frozen=True)
class Empty:
    """A message without content."""


@dataclass(frozen=True)
class Acknowledged:
    """Whether the receiver knew what the message was about."""

    known: bool = True


@dataclass(frozen=True)
class Drain:
    """Take no new work, finish what can be finished in time, hand the rest over. Answered when nothing is held."""

    timeout_s: float


@dataclass(frozen=True)
class RankHealth:
    """A rank's own view of itself; `failure` is empty while it works."""

    ready: bool
    num_steps: int
    busy_s: float  # since the step in progress began, 0 when idle
    failure: str = ""
    drained: bool = False  # the replica, on request: it takes no work any more and holds nothing

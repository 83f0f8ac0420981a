"""What a rank is told when it starts: who it is and its sections of the configuration."""

import secrets
from dataclasses import dataclass

from core.config import ModelConfig, PoolConfig, TransferConfig
from core.messages.fleet import Role
from core.security import UNGUARDED, Security, is_loopback

# Of every rank's process, before it starts. From 512 KiB on, a copy writes past the caches, which it would only sweep;
# from 8 MiB on it reads four pages at once; glibc alone begins at three quarters of the largest cache. torch's stores
# ask for the name of each address that they connect to: a name server that keeps silent costs a second then, in place
# of five, and the connection is tried again. Other C libraries and processors ignore both.
RANK_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x80000",
    "RES_OPTIONS": "timeout:1 attempts:1",
}


@dataclass(frozen=True)
class RankSpec:
    """Start-up orders of one rank. The first rank hosts the replica's rendezvous store at `store_address`."""

    role: Role
    replica_id: str
    incarnation: int
    rank: int
    rank_addresses: tuple[str, ...]  # host:port where each rank serves and is reached; port 0 for a lone rank: any
    store_address: str  # host:port, unused by a lone rank
    model: ModelConfig
    pool: PoolConfig
    transfer: TransferConfig
    block_size: int
    security: Security = UNGUARDED
    generation: str = ""
    tenant_salt: str = ""  # the fleet's
    weight_lenders: tuple[str, ...] = ()  # host:port of living ranks of this number that may have its weights

    @property
    def host(self) -> str:
        """The interface to bind and to advertise."""
        return self.rank_addresses[self.rank].rpartition(":")[0]

    @property
    def group_host(self) -> str:
        """The interface towards the replica's other ranks: loopback when their store is there, so on one host."""
        store_host = self.store_address.rpartition(":")[0]
        return store_host if is_loopback(store_host) else self.host

    @property
    def port(self) -> int:
        """Where to listen; 0: anywhere."""
        return int(self.rank_addresses[self.rank].rpartition(":")[2])


def new_incarnation() -> int:
    """A number that no earlier process of the replica has had."""
    return secrets.randbits(48)

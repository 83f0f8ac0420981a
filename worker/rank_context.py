"""What a rank's main prepares and its role uses."""

from dataclasses import dataclass
from typing import Protocol

from core.messages.fleet import ReplicaInfo
from core.messages.to_rank import SlabHeader
from core.messages.to_scheduler import ReplicaStatus
from engine.block_pool import BlockPool
from kv_transfer.agent import TransferAgent
from rpc.client import RpcClient
from rpc.server import RpcServer
from worker.drainer import Drainer
from worker.engine_thread import EngineThread
from worker.lender import Lender
from worker.samples import Samples
from worker.spec import RankSpec
from worker.tiers import Tiers


@dataclass(frozen=True)
class RankContext:
    """The parts of a replica's first rank, made before its role starts."""

    spec: RankSpec
    info: ReplicaInfo
    engine: EngineThread
    block_pool: BlockPool
    agent: TransferAgent
    lender: Lender
    tiers: Tiers
    client: RpcClient


class RoleService(Protocol):
    """What prefill and decode each put on top of a rank."""

    def bind(self, server: RpcServer) -> None:
        """Registers the role's calls."""
        ...

    async def run(self) -> None:
        """Serves until cancelled; raises when the engine fails."""
        ...

    @property
    def drainer(self) -> Drainer:
        """The role's way out."""
        ...

    @property
    def samples(self) -> Samples:
        """What it measured lately."""
        ...

    def status(self) -> ReplicaStatus:
        """Load at this moment."""
        ...

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a peer may fetch these blocks."""
        ...

"""Small fleets of transfer agents in one process, joined by method calls in place of RPC."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.config import TransferConfig
from core.errors import PeerLost
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import Acknowledged
from core.messages.to_rank import (
    BlockDigests,
    CloseChannel,
    Connect,
    Connected,
    DigestBlocks,
    FetchBlocks,
    Granted,
    Ready,
    SlabHeader,
)
from kv_transfer.agent import TransferAgent
from kv_transfer.channels.in_process import Hub, InProcessConnector
from kv_transfer.channels.protocol import Connector
from kv_transfer.channels.select import make_connectors
from kv_transfer.channels.strict import StrictLine
from kv_transfer.channels.tcp import TcpConnector
from kv_transfer.plan import Move, plan_copies

HOST = "127.0.0.1"
SMALL_SLABS = TransferConfig(slab_mib=0.002, pair_window_mib=0.004, rank_window_mib=0.006)
COMPATIBILITY = Compatibility("demo", "r1", "bfloat16", 16, "scheme")


Pairs = list[tuple[int, int]]  # (source block, destination block)


def layout_of(tensor_parallel: int = 1, num_kv_heads: int = 4) -> KVLayout:
    return KVLayout(3, num_kv_heads, 8, 4, "bfloat16", tensor_parallel)


def block_shape(layout: KVLayout) -> tuple[int, ...]:
    """One layer of one block with the heads of all ranks."""
    return layout.num_planes, layout.num_kv_heads, layout.block_size, layout.head_dim


def random_pools(layout: KVLayout, num_blocks: int, seed: int, group: int = 0) -> list[torch.Tensor]:
    """Pools of all ranks of a replica, holding the slices of one full-heads pool of all places of a KV group's blocks.

    Of a stage that has fewer of them than others, the last places are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.num_places, num_blocks, *block_shape(layout))
    full = torch.randn(shape, generator=generator).to(getattr(torch, layout.dtype))
    pools = []
    for rank in range(layout.num_ranks):
        places, heads = layout.places_of_stage(layout.stage_of(rank), group), layout.heads_of_rank(rank)
        held = full[places.start : places.stop, :, :, heads.start : heads.stop]
        pools.append(torch.zeros(layout.places_per_rank, *held.shape[1:], dtype=full.dtype))
        pools[-1][: len(places)] = held
    return pools


class DirectControl:
    """PeerControl by method call; a removed agent is a dead process."""

    def __init__(self) -> None:
        self.agents: dict[str, TransferAgent] = {}

    def _agent(self, address: str) -> TransferAgent:
        if address not in self.agents:
            raise PeerLost(f"{address} is gone")
        return self.agents[address]

    async def connect(self, address: str, message: Connect) -> Connected:
        return await self._agent(address).on_connect(message)

    async def ready(self, address: str, message: Ready) -> Granted:
        return await self._agent(address).on_ready(message)

    async def digest(self, address: str, message: DigestBlocks) -> BlockDigests:
        return await self._agent(address).on_digest(message)

    async def close(self, address: str, message: CloseChannel) -> Acknowledged:
        return await self._agent(address).on_close(message)


def make_hub(kind: str) -> Hub:
    return Hub(StrictLine) if kind == "strict" else Hub()


def connector_of(kind: str, hub: Hub, pool: torch.Tensor, timeout_s: float = 5.0) -> Connector:
    """For shared memory, `pool` must come from `shared`."""
    if kind in ("in_process", "strict"):
        return InProcessConnector(hub, pool)
    if kind == "tcp":
        return TcpConnector(HOST, pool, timeout_s)
    config = TransferConfig(channel=kind, connect_timeout_s=timeout_s)
    return make_connectors(config, HOST, pool, SHARED_PATHS.get(pool.data_ptr()))[0]


def connectors_of(kind: str, hub: Hub, pool: torch.Tensor) -> tuple[Connector, ...]:
    """All that an agent offers."""
    if kind == "measured":
        return make_connectors(TransferConfig(channel=kind), HOST, pool, SHARED_PATHS.get(pool.data_ptr()))
    return (connector_of(kind, hub, pool),)


SHARED_PATHS: dict[int, Path] = {}  # by address of a pool


def shared(pool: torch.Tensor, folder: Path) -> torch.Tensor:
    """The pool's content in a file that other processes can map."""
    path = folder / f"pool-{len(list(folder.iterdir()))}"
    path.touch()
    mapped = torch.from_file(str(path), shared=True, size=pool.numel(), dtype=pool.dtype).view(pool.shape)
    SHARED_PATHS[mapped.data_ptr()] = path
    return mapped.copy_(pool)


@dataclass
class Fleet:
    """Replicas of agents by name; every agent may read what `readable` says."""

    kind: str
    config: TransferConfig = SMALL_SLABS
    control: DirectControl = field(default_factory=DirectControl)
    pools: dict[str, torch.Tensor] = field(default_factory=dict)
    layouts: dict[str, KVLayout] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    folder: Path | None = None  # of shared pools

    def __post_init__(self) -> None:
        self.hub = make_hub(self.kind)

    def start(self, replica: str, layout: KVLayout, num_blocks: int = 24, incarnation: int = 1, seed: int = 0) -> None:
        self.layouts[replica] = layout
        for rank, pool in enumerate(random_pools(layout, num_blocks, seed)):
            address = f"{replica}/{rank}"
            if self.kind in ("shared_memory", "measured"):
                pool = shared(pool, self.folder)
            self.pools[address] = pool
            self.control.agents[address] = TransferAgent(
                address=address,
                incarnation=incarnation,
                pool=pool,
                layout=layout,
                compatibility=COMPATIBILITY,
                config=self.config,
                connectors=connectors_of(self.kind, self.hub, pool),
                control=self.control,
                may_read=self.may_read,
            )

    @property
    def connector_kind(self) -> str:
        """The transport's name."""
        return "in_process" if self.kind == "strict" else self.kind

    def may_read(self, header: SlabHeader) -> bool:
        return header.request_id not in self.refused

    def agent(self, address: str) -> TransferAgent:
        return self.control.agents[address]

    def order(
        self, source: str, destination: str, rank: int, blocks: Pairs, request: str = "r", timeout_s: float = 10.0
    ) -> FetchBlocks:
        """Fetch of (source block, destination block) pairs of all layers."""
        layout = self.layouts[source]
        sources, destinations = (tuple(side) for side in zip(*blocks, strict=True))
        move = Move(layout, self.layouts[destination], range(layout.num_layers), sources, destinations)
        addresses = tuple(f"{source}/{peer}" for peer in range(layout.num_ranks))
        return FetchBlocks(request, 1, addresses, layout, plan_copies(move, rank), timeout_s)

    def full(self, replica: str, blocks: list[int]) -> torch.Tensor:
        """All heads of some blocks of a replica, [layers, blocks, planes, heads, size, dim]."""
        layout = self.layouts[replica]
        shape = (layout.num_layers, len(blocks), *block_shape(layout))
        out = torch.zeros(shape, dtype=getattr(torch, layout.dtype))
        for rank in range(layout.tensor_parallel):
            heads = layout.heads_of_rank(rank)
            out[:, :, :, heads.start : heads.stop] = self.pools[f"{replica}/{rank}"][:, blocks]
        return out

    async def stop(self, replica: str) -> None:
        """Ends a replica: first unreachable, then closed."""
        for address in [a for a in self.control.agents if a.startswith(f"{replica}/")]:
            await self.control.agents.pop(address).close()

    async def close(self) -> None:
        for agent in self.control.agents.values():
            await agent.close()


def random_pairs(num: int, num_blocks: int, seed: int) -> Pairs:
    chosen = random.Random(seed)
    return list(zip(chosen.sample(range(num_blocks), num), chosen.sample(range(num_blocks), num), strict=True))

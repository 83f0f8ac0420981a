"""How the ranks of a replica meet: all at one store, the parts of each stage in a group, stages by their links."""

from dataclasses import dataclass, field

import torch

from core.errors import PeerLost
from core.kv_layout import KVLayout
from engine.pipeline import Pipeline, SingleStage
from engine.rank_group import RankGroup, SingleRank
from engine.rank_store import RankStore
from engine.stage_links import StageLinks
from engine.tensor_parallel import TensorParallelGroup


@dataclass(frozen=True)
class RankLinks:
    """One rank's ways to the others."""

    group: RankGroup = field(default_factory=SingleRank)
    pipeline: Pipeline = field(default_factory=SingleStage)


def connect_ranks(
    store_address: str,
    rank: int,
    layout: KVLayout,
    device: torch.device,
    host: str = "127.0.0.1",
    timeout_s: float = 30.0,
) -> RankLinks:
    """Meets the other ranks at the store, which the first rank hosts at `store_address` (host:port).

    `host` is this rank's own interface. Raises PeerLost when a rank is missing or silent for `timeout_s`.
    """
    if layout.num_ranks == 1:
        return RankLinks()
    try:
        store = RankStore(store_address, host, timeout_s, hosts=rank == 0)
        group: RankGroup = SingleRank()
        if layout.tensor_parallel > 1:
            name, part = f"stage{layout.stage_of(rank)}", layout.part_of(rank)
            group = TensorParallelGroup(store, name, part, layout.tensor_parallel, device)
        pipeline: Pipeline = SingleStage()
        if layout.pipeline_parallel > 1:
            pipeline = StageLinks(store, rank, layout, device, timeout_s)
    except (RuntimeError, PeerLost) as error:
        raise PeerLost(
            f"rank {rank} of {layout.num_ranks} could not meet the others at {store_address}: {error}"
        ) from error
    return RankLinks(group, pipeline)
